"""Prompts -> groups of near duplicates, which belong into the same file of a split.

Two prompts are near duplicates where ten words in a row are the same, or where they differ in one
word. A near duplicate of a near duplicate is in the same group. Upper and lower case are the same,
and what is no word does not count. The time that this takes grows as the number of prompts."""

import re
from collections import Counter

FEWEST_WORDS = 4  # of a prompt that may differ in one word from its near duplicates
SHORTEST_RUN = 10  # words
LONGEST_RUN = 30
# No group may be larger than the larger of these two: the more prompts there are, the more of them
# share a common phrase, until such phrases chain most prompts together.
LARGEST_GROUP = 100  # prompts
LARGEST_SHARE = 0.01  # of all prompts


def group_near_duplicates(prompts):
    """{prompt: the name of its group}; a group's name is its first prompt in alphabetical order.

    The order of the prompts makes no difference. Where ten words in a row make too large a group,
    more words in a row must be the same."""
    prompts = sorted(set(prompts))
    largest = max(LARGEST_GROUP, LARGEST_SHARE * len(prompts))
    for run in range(SHORTEST_RUN, LONGEST_RUN + 1):
        groups = join_prompts(prompts, run)
        sizes = Counter(groups.values())
        if not prompts or max(sizes.values()) <= largest:
            break
    return groups


def join_prompts(prompts, run):
    """group_near_duplicates() of sorted prompts, with `run` words in a row."""
    leaders = {}  # prompt -> itself, or a prompt of its group that stands before it
    first_with = {}  # key -> the first prompt that has it
    for prompt in prompts:
        leaders[prompt] = prompt
        for key in list_keys(prompt, run):
            other = first_with.setdefault(key, prompt)
            leader = find_leader(leaders, prompt)
            other_leader = find_leader(leaders, other)
            leaders[max(leader, other_leader)] = min(leader, other_leader)
    return {prompt: find_leader(leaders, prompt) for prompt in prompts}


def find_leader(leaders, prompt):
    """The first prompt of a prompt's group; the way to it is shortened for the next time."""
    while leaders[prompt] != prompt:
        leaders[prompt] = leaders[leaders[prompt]]
        prompt = leaders[prompt]
    return prompt


def list_keys(prompt, run):
    """Tuples of words, of which near duplicates have one in common."""
    words = re.findall(r"\w+", prompt.lower())
    keys = [tuple(words)]
    for i in range(len(words) - run + 1):
        keys.append(tuple(words[i : i + run]))
    # A longer prompt has such a run before or behind the word in which it differs.
    if FEWEST_WORDS <= len(words) < 2 * run:
        for i in range(len(words)):
            keys.append(tuple(words[:i] + words[i + 1 :]))
    return keys
