"""AlpacaFarm: pairs of answers to Alpaca's instructions, compared by people or by GPT-4.

$ python data/alpaca_farm/prepare.py                     # people's, about 10,000 pairs
$ python data/alpaca_farm/prepare.py --judge=gpt4        # or noisy_multi: simulated people"""

from configurator import configure
from nanosafe.errors import choose
from nanosafe.tools import download

judge = "human"  # human | gpt4 | noisy_multi
config = configure(globals(), vars(download))

HUB = "tatsu-lab/alpaca_farm"
RELEASES = {
    "human": download.Release(HUB, "^alpaca_human_preference.json$"),
    "gpt4": download.Release(HUB, "^alpaca_gpt4_preference.json$", subfolder="gpt4"),
    "noisy_multi": download.Release(
        HUB, "^alpaca_noisy_multi_preference.json$", subfolder="noisy_multi"
    ),
}


def to_record(row):
    """preference says which output is better, 1 or 2; 0 is a tie."""
    prompt = row["instruction"]
    if row.get("input"):
        prompt += " " + row["input"]
    if row["preference"] not in (1, 2):
        raise ValueError("no preference")
    return {
        "input": prompt,
        "answer": row["output_1"],
        "other_answer": row["output_2"],
        "better": row["preference"] == 1,
    }


choose("judge", judge, RELEASES)
download.prepare(__file__, to_record, config, RELEASES[judge])
