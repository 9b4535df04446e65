"""Which cognitive behaviours do answers show? By a lexicon, or counted by a judge. [OVR §4]

Four visual behaviours and their linguistic counterparts; what moved from text to vision is the
ratio of their rates.
"""
import json
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean

import data as datasets

IMAGE = r"\b(?:image|picture|figure|diagram|graph|chart|photo|drawing|table|scene)s?\b"
PLACE = r"\b(?:left|right|top|bottom|upper|lower|corner|cent(?:er|re)|middle|region|row|column)"
GOAL = r"\bto (?:get|reach|obtain|find|make|have|answer)\b.{0,80}\b(?:need|must|require)"
# A visual behaviour, then its linguistic counterpart: an example, from [OVR T1, Fig. 7] but for
# verification, and our lexicon: a sentence that holds the regular expression is one instance.
BEHAVIOURS = {
    "visual reflection": ("Let me see the image again.", rf"(?=.*{IMAGE}).*\b(?:(?:look|see|check)"
        r".*\b(?:again|back|once more)|re-?(?:exam|check|vis)|(?:wait|hmm|hold on)\b)"),
    "backtracking": ("That calculation led to a dead end. Let's try subtracting Y from X instead. "
        "My previous assumption about the sequence was wrong. Starting over with...",
        r"dead end|start(?:ing)? over|(?:won't|didn't) work|made an? (?:mistake|error)|\bwait, no"
        r"|\b(?:was|is|are) (?:wrong|incorrect|not right)|\b(?:try|use) (?:another|a different) "),
    "visual divide-and-conquer": ("Let's first look at the numbers on the left.",
        rf"\b(?:first|next|then|now|let's|let me)\b.*\b(?:look|focus|count|read|exam)\w*.*{PLACE}"),
    "subgoal setting": ("First, we need to...",
        r"\b(?:first|next|then|finally),? (?:i|we|let's|let me)\b|\bstep \d|\bbreak \w+ down"),
    "visual verification": ("I will now verify this against the image.",
        rf"(?:verif|confirm|double-?check|cross-?check|consistent with|matches).*{IMAGE}"),
    "verification": ("Let me check this result by another calculation.",
        r"\bverif|\bconfirm|double-?check|checks out|\bcheck (?:this|that|if|whether|my|the|it)\b"),
    "goal-driven visual tracing": ("To get this answer, I need to find an object that...",
        rf"{GOAL}.*(?:find|look for|locate|spot|see).*(?:{IMAGE}|object|shape|region|colou?r)"),
    "backward chaining": ("To get 75, we need a number divisible by...",
        rf"{GOAL}|work(?:ing)? backwards?\b|\bfor (?:this|that|it) to (?:be|hold)")}


TRANSFER = dict(zip([*BEHAVIOURS][::2], [*BEHAVIOURS][1::2]))  # visual: linguistic


def lexicon_count(name: str, row: dict) -> int:
    """Sentences that show the behaviour, by the lexicon; 500 characters of each are read."""
    pattern = re.compile(BEHAVIOURS[name][1])
    text = row["completion"].lower().replace("’", "'")
    count = 0
    for sentence in re.split(r"(?<=[.!?])\s|\n", text):
        if pattern.search(sentence[:500]):
            count += 1
    return count


def judge_count(name: str, row: dict, url: str, model: str) -> int | None:
    """What a judge counts, asked in the order of [OVR App. C]; None where it gives no <count>."""
    question = row.get("question", "")
    request = (f'Problem Statement: "{question}"\n\nModel\'s Reasoning: "'
               f'{row["completion"]}"\n\nLook in the text of this reasoning for {name}, as in "'
               f'{BEHAVIOURS[name][0]}" Count the distinct instances. '
               "Provide the count in <count>X</count> tags. If none, use <count>0</count>.")
    message = {"role": "user", "content": request}
    body = json.dumps({"model": model, "temperature": 0, "messages": [message]})
    key = os.environ.get("JUDGE_API_KEY", "")
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with datasets.blame(f"--judge {url}: no answer to a chat completion"):
        call = urllib.request.Request(f"{url}/chat/completions", body.encode(), head)
        with urllib.request.urlopen(call, timeout=120) as reply:
            content = json.load(reply)["choices"][0]["message"]["content"]
        found = re.findall(r"<count>\s*(\d{1,6})\s*</count>", content)
    return int(found[-1]) if found else None


def rates_of(rows: list[dict], count) -> dict:
    """The share of answers that show each behaviour, and what moved from text to vision.

    count(behaviour, row): its instances in the answer, None if the judge was vague.
    """
    rates = {}
    unjudged = 0
    for name in BEHAVIOURS:
        with ThreadPoolExecutor(8) as pool:  # a judge takes its time
            counts = [*pool.map(partial(count, name), rows)]
        shown = [n > 0 for n in counts if n is not None]
        rates[name] = fmean(shown) if shown else 0.0
        unjudged += counts.count(None)
    # [OVR §4] BTR = CBR_visual / CBR_linguistic; undefined where nothing could be carried over
    transfer = {}
    for visual, linguistic in TRANSFER.items():
        base = rates[linguistic]
        transfer[visual] = rates[visual] / base if base else None
    return dict(answers=len(rows), unjudged=unjudged, rates=rates, transfer=transfer)
