"""SlimOrca, GPT-4's answers to FLAN's questions, and what has ShareGPT's layout: demonstrations.

$ python data/slim_orca/prepare.py                       # 986 MB, 517,982 dialogues
$ python data/slim_orca/prepare.py --version=dedup       # Open-Orca/SlimOrca-Dedup"""

from configurator import configure
from nanosafe.tools import download

version = "full"  # full | dedup
config = configure(globals(), vars(download))

ROLES = {"human": "user", "gpt": "assistant"}  # the others have these names


def to_record(row):
    """A dialogue; what the system says begins the human's first turn."""
    turns, system = [], ""
    for message in row["conversations"]:
        role, text = ROLES.get(message["from"], message["from"]), message["value"].strip()
        if role == "system" and not turns:
            system = text + "\n\n" if text else ""
        elif role != ("user", "assistant")[len(turns) % 2]:
            raise ValueError("the turns do not alternate")
        else:
            turns.append(system + text if not turns else text)
    if len(turns) < 2 or len(turns) % 2 or not all(turns):
        raise ValueError("an empty turn, or no answer")
    return {"dialogue": turns}


download.prepare(__file__, to_record, config, release="version")
