"""SlimOrca, GPT-4's answers to FLAN's questions, and what has ShareGPT's layout: demonstrations.

$ python data/slim_orca/prepare.py                       # 986 MB, 517,982 dialogues
$ python data/slim_orca/prepare.py --version=dedup       # Open-Orca/SlimOrca-Dedup"""

from configurator import configure
from nanosafe.errors import choose
from nanosafe.tools import download

version = "full"  # full | dedup
config = configure(globals(), vars(download))

RELEASES = {
    "full": download.Release("Open-Orca/SlimOrca"),
    "dedup": download.Release("Open-Orca/SlimOrca-Dedup", subfolder="dedup"),
}
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of the usual roles


def to_record(row):
    """A dialogue; what the system says begins the human's first turn."""
    system = ""
    turns = []
    for message in row["conversations"]:
        role = ROLES.get(message["from"], message["from"])
        text = message["value"].strip()
        expected = "user" if len(turns) % 2 == 0 else "assistant"
        if role == "system" and not turns:
            system = text + "\n\n" if text else ""
        elif role == expected:
            turns.append(text if turns else system + text)
        else:
            raise ValueError("the turns do not alternate")
    if len(turns) < 2 or len(turns) % 2 or not all(turns):
        raise ValueError("an empty turn, or no answer")
    return {"dialogue": turns}


choose("version", version, RELEASES)
download.prepare(__file__, to_record, config, RELEASES[version])
