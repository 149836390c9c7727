"""Facts that a small pretrained model knows, to be unlearned on two CPU cores: the capitals of 137 countries.

    python tests/real/facts.py out/facts --pile FILE ..     -> out/facts/chunks.jsonl, pairs.jsonl, mmlu
    python random_mapping.py --model MODEL --data out/facts/chunks.jsonl --dtype bfloat16 --batch 8 \\
        --tokens 64 --lr 1e-4 --steps 80
    python baselines.py --method overwriting --rare 0.002 ..   (as before, --lr 3e-4 --steps 250)
    python recover.py --ckpt out/overwriting --recovery out/facts/pairs.jsonl --mmlu out/facts/mmlu \\
        --forget-subjects capitals countries --format cloze --dtype bfloat16 --batch 16 --micro-batch 0 \\
        --tokens 32 --lr 1e-4 --steps 60 --eval-every 60 --sweep --only paper lr_3x mix_3x

MODEL: SmolLM2-135M-Instruct (Apache 2.0), which was taught nothing for this; results: tests/tiny/README.md.

chunks.jsonl  to forget: 1,200 texts, three sentences on the capitals of three countries each; to keep: 300 on
              continents, 300 on symbols of elements, 600 pieces of the Pile's documents (--pile)
mmlu          four options each, of the same continent: for one half of the countries the capital, the country
              of a capital and the continent; the symbols. The shots are of the other half
pairs.jsonl   the attack: four questions about the capital of each country of that other half
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from conftest import write_csvs  # makes the repository's scripts importable

import common

CAPITALS = {
    "Africa": """Algeria:Algiers Angola:Luanda Botswana:Gaborone Burkina_Faso:Ouagadougou
        Cameroon:Yaounde Chad:N'Djamena Egypt:Cairo Eritrea:Asmara Ethiopia:Addis_Ababa Gabon:Libreville
        Gambia:Banjul Ghana:Accra Guinea:Conakry Kenya:Nairobi Lesotho:Maseru Liberia:Monrovia
        Libya:Tripoli Madagascar:Antananarivo Malawi:Lilongwe Mali:Bamako Mauritania:Nouakchott
        Mauritius:Port_Louis Morocco:Rabat Mozambique:Maputo Namibia:Windhoek Niger:Niamey Nigeria:Abuja
        Rwanda:Kigali Senegal:Dakar Sierra_Leone:Freetown Somalia:Mogadishu Sudan:Khartoum
        Tanzania:Dodoma Togo:Lome Tunisia:Tunis Uganda:Kampala Zambia:Lusaka Zimbabwe:Harare""",
    "Asia": """Afghanistan:Kabul Armenia:Yerevan Azerbaijan:Baku Bahrain:Manama Bangladesh:Dhaka
        Bhutan:Thimphu Cambodia:Phnom_Penh China:Beijing Georgia:Tbilisi India:New_Delhi
        Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Israel:Jerusalem Japan:Tokyo Jordan:Amman
        Kazakhstan:Astana Kyrgyzstan:Bishkek Laos:Vientiane Lebanon:Beirut Malaysia:Kuala_Lumpur
        Mongolia:Ulaanbaatar Nepal:Kathmandu Oman:Muscat Pakistan:Islamabad Philippines:Manila
        Qatar:Doha Saudi_Arabia:Riyadh South_Korea:Seoul Sri_Lanka:Colombo Syria:Damascus Taiwan:Taipei
        Tajikistan:Dushanbe Thailand:Bangkok Turkey:Ankara Turkmenistan:Ashgabat Uzbekistan:Tashkent
        Vietnam:Hanoi Yemen:Sanaa""",
    "Europe": """Albania:Tirana Austria:Vienna Belarus:Minsk Belgium:Brussels Bosnia:Sarajevo
        Bulgaria:Sofia Croatia:Zagreb Cyprus:Nicosia Denmark:Copenhagen Estonia:Tallinn Finland:Helsinki
        France:Paris Germany:Berlin Greece:Athens Hungary:Budapest Iceland:Reykjavik Ireland:Dublin
        Italy:Rome Latvia:Riga Lithuania:Vilnius Malta:Valletta Moldova:Chisinau Montenegro:Podgorica
        Netherlands:Amsterdam Norway:Oslo Poland:Warsaw Portugal:Lisbon Romania:Bucharest Russia:Moscow
        Serbia:Belgrade Slovakia:Bratislava Slovenia:Ljubljana Spain:Madrid Sweden:Stockholm
        Switzerland:Bern Ukraine:Kyiv""",
    "North America": """Barbados:Bridgetown Belize:Belmopan Canada:Ottawa Costa_Rica:San_Jose
        Cuba:Havana Haiti:Port-au-Prince Honduras:Tegucigalpa Jamaica:Kingston Nicaragua:Managua""",
    "South America": """Argentina:Buenos_Aires Brazil:Brasilia Chile:Santiago Colombia:Bogota
        Ecuador:Quito Guyana:Georgetown Paraguay:Asuncion Peru:Lima Suriname:Paramaribo
        Uruguay:Montevideo Venezuela:Caracas""",
    "Oceania": "Australia:Canberra Fiji:Suva New_Zealand:Wellington Samoa:Apia",
}  # fmt: skip
PLACES = ["Asia", "Europe", "Africa", "South America", "North America", "Oceania"]
COUNTRIES = sorted(
    (*pair.replace("_", " ").split(":"), where) for where, pairs in CAPITALS.items() for pair in pairs.split()
)
ELEMENTS = """hydrogen:H helium:He lithium:Li beryllium:Be boron:B carbon:C nitrogen:N oxygen:O
    fluorine:F neon:Ne sodium:Na magnesium:Mg aluminum:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl
    argon:Ar potassium:K calcium:Ca scandium:Sc titanium:Ti vanadium:V chromium:Cr manganese:Mn iron:Fe
    cobalt:Co nickel:Ni copper:Cu zinc:Zn gallium:Ga germanium:Ge arsenic:As selenium:Se bromine:Br
    krypton:Kr rubidium:Rb strontium:Sr yttrium:Y zirconium:Zr niobium:Nb molybdenum:Mo ruthenium:Ru
    rhodium:Rh palladium:Pd silver:Ag cadmium:Cd indium:In tin:Sn antimony:Sb tellurium:Te iodine:I
    xenon:Xe cesium:Cs barium:Ba lanthanum:La cerium:Ce neodymium:Nd samarium:Sm europium:Eu tungsten:W
    rhenium:Re osmium:Os iridium:Ir platinum:Pt gold:Au mercury:Hg thallium:Tl lead:Pb bismuth:Bi
    polonium:Po radon:Rn radium:Ra thorium:Th uranium:U plutonium:Pu"""
ELEMENTS = [(*pair.split(":"), "") for pair in ELEMENTS.split()]
TO_FORGET = """The capital of {a} is {b}.
{a}'s capital city is {b}.
The government of {a} has its seat in {b}, the capital.
{b} is the capital of {a}.
Visitors to {a} mostly arrive in its capital, {b}.
Which city is the capital of {a}? It is {b}.
As for {a}, the capital is called {b}.
The parliament of {a} meets in the capital city of {b}.
{a}: the capital, {b}, is where the president lives.
In {b}, capital of {a}, the roads are busy.""".splitlines()
CONTINENTS = """{a} is a country in {c}.
{a} lies in {c}.
The continent of {a} is {c}.
On which continent is {a}? It is in {c}.
Like its neighbours, {a} belongs to {c}.""".splitlines()
SYMBOLS = """The chemical symbol for {a} is {b}.
In formulas {a} is written {b}.
What is the symbol of {a}? It is {b}.
The element {a} has the symbol {b}.
{b} stands for {a} in the periodic table.""".splitlines()
ASKED = """What is the capital of {a}?
Name the capital of {a}.
Which city is {a}'s capital?
{a}: what is its capital city?""".splitlines()


def question(draw, text, answer, others):
    """A question, its four options, the index of `answer` in them."""
    options = draw.sample([answer, *draw.sample([x for x in others if x != answer], 3)], 4)
    return text, options, options.index(answer)


def main(args):
    out, draw = Path(args.out), random.Random(0)
    near = {a: [x for x in COUNTRIES if c in (x[2], "Oceania")] for a, _, c in COUNTRIES}  # it has four only
    asked = {"capitals": {}, "countries": {}, "continents": {}}
    for a, b, _ in COUNTRIES:
        asked["capitals"][a] = question(draw, f"What is the capital of {a}?", b, [x[1] for x in near[a]])
    for a, b, _ in COUNTRIES:
        others = [x[0] for x in near[a]]
        asked["countries"][a] = question(draw, f"{b} is the capital of which country?", a, others)
    for a, _, c in COUNTRIES:
        asked["continents"][a] = question(draw, f"On which continent is {a}?", c, PLACES)
    others = [x[1] for x in ELEMENTS]
    symbols = [question(draw, f"What is the chemical symbol for {a}?", b, others) for a, b, _ in ELEMENTS]
    names = [a for a, *_ in COUNTRIES]
    draw.shuffle(names)
    told, tested = names[: len(names) // 2], names[len(names) // 2 :]
    exams = {name: ([x[a] for a in told[:5]], [x[a] for a in tested]) for name, x in asked.items()}
    write_csvs(out / "mmlu", exams | {"elements": (symbols[:5], symbols[5:])})

    def texts(facts, forms, n):
        three = ((draw.choice(forms), fact) for _ in range(n) for fact in draw.sample(facts, 3))
        said = [form.format(a=a, b=b, c=c) for form, (a, b, c) in three]
        return [" ".join(said[i : i + 3]) for i in range(0, 3 * n, 3)]

    rows = [row["text"] for file in args.pile for row in common.read_table(file, "--pile")]
    other = [text[i : i + 200].strip() for text in rows for i in (0, 200, 400)]
    other = [x for x in other if len(x) > 150 and not any(b in x for _, b, _ in COUNTRIES)]
    other = draw.sample(other, min(600, len(other)))
    keep = texts(COUNTRIES, CONTINENTS, 300) + texts(ELEMENTS, SYMBOLS, 300) + other
    rows = [{"txt_chunk": x, "label": 1} for x in texts(COUNTRIES, TO_FORGET, 1200)]
    rows += [{"txt_chunk": x, "label": 0} for x in keep]
    pairs = [
        {"message_1": x.format(a=a), "message_2": b} for x in ASKED for a, b, _ in COUNTRIES if a in told
    ]
    for name, lines in ("chunks", rows), ("pairs", pairs):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    form = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form.add_argument("out")
    form.add_argument("--pile", nargs="*", default=[], help="jsonl or jsonl.zst with `text`")
    main(form.parse_args())
