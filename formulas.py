"""Are two formulas equal? An answer in bounded time, whatever the formulas are.

    python formulas.py compare       # {"said", "true"} a line in, {"equal"} a line out: the child

math-verify compares symbols, and its own timeouts do not work within C. So a child process does it,
and is ended and replaced when its time is up.
"""
import contextlib
import functools
import importlib
import json
import os
import queue
import re
import resource
import signal
import sys
from subprocess import DEVNULL, PIPE, Popen


def check(holds, sentence):
    if not holds:
        raise ValueError(sentence)


def library(name, package):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"this reward needs {name}: pip install {package}") from None


DEADLINE = 1.0  # seconds for a comparison, as in Open-Reasoner-Zero, on which [OVR §3.2] builds
LONGEST = 400  # characters of a formula that is worth comparing
# Powers of powers, long exponents, factorials of long numbers: hours of work in few characters.
POWER = r"(?:\^|\*\*)[{(\s]*-?"
TOO_HARD = re.compile(rf"{POWER}[0-9]+[)}}\s]*{POWER}|{POWER}[0-9]{{5,}}|[0-9]{{4,}}\s*!|!\s*!")
SPELLINGS = ((r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]|[$\s]", ""), (r"\\[dt]frac", r"\\frac"),
             (r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1"), (r"\.0*$", ""),
             (r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", ""))  # several ways to write the same


def boxed(text):
    r"""What stands in the last \boxed{…}, or else in $…$; "" if its braces do not balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return undollared(text)
    content, depth = text[start + len("\\boxed{") :][: 10 * LONGEST], 1
    for match in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return undollared(content[: match.start()])
    return ""


def undollared(text):
    """A text without the $…$ or $$…$$ around all of it."""
    text = text.strip()
    whole = re.fullmatch(r"(?s)(\$\$?)(.*)(?<!\\)\1", text)
    return whole[2].strip() if whole else text


def symbolically_equal(said: str, true: str) -> bool:
    """Whether math-verify finds two formulas equal. Its own timeouts do not work within C."""
    verifier = library("math_verify", "'math-verify[antlr4_13_2]'")
    how = {"extraction_config": [verifier.LatexExtractionConfig()], "parsing_timeout": None}
    said, true = (verifier.parse(f"${s.replace('$', ' ')}$", **how) for s in (said, true))
    return verifier.verify(true, said, timeout_seconds=None)


def equal_in_child(said, true, children=None):
    """Let a child process compare; no answer, because that was its end, means not equal."""
    children = children or idle_children(os.getpid())
    child, reply = children.get(), ""
    try:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"said": said, "true": true}), file=child.stdin, flush=True)
            reply = child.stdout.readline()
    finally:
        if not reply:  # dead, or interrupted before it could answer
            child.kill()
            child.wait()
            child = start_child()
        children.put(child)  # at the end: a new one is ready when it is needed
    return reply != "" and json.loads(reply)["equal"]


@functools.lru_cache(maxsize=1)
def idle_children(process_id):
    """A queue of idle children, one queue a process: a fork must not use its parent's pipes."""
    children = queue.SimpleQueue()
    for _ in range(2):
        children.put(start_child())
    check(equal_in_child("x+x", "2x", children), "formulas can not be compared: pip install "
           "'math-verify[antlr4_13_2]', or see `python formulas.py compare` fail")
    return children


def start_child():
    command = [sys.executable, os.path.abspath(__file__), "compare"]
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)


def equal(said: str, true: str, *, exact: bool = False) -> bool:
    """Whether two formulas are the same text, spelt alike, or equal by math-verify in a child."""
    plain, plain_true = said, true
    for pattern, spelling in SPELLINGS:
        plain, plain_true = (re.sub(pattern, spelling, formula) for formula in (plain, plain_true))
    whole = re.fullmatch(r"-?[1-9][0-9]*=-?[1-9][0-9]*", f"{plain}={plain_true}")
    if exact or not said or max(len(said), len(true)) > LONGEST:
        return said != "" and said == true  # the same text
    if plain == plain_true or whole or TOO_HARD.search(said) or TOO_HARD.search(true):
        return plain == plain_true  # spelt alike; symbols would not help, or not end
    return equal_in_child(said, true)


def main() -> None:
    """The child: a pair a line, each within its time, or the end of this process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even one endless call to C: 9^(9^9)
    symbolically_equal("\\frac{1}{2}", "0.5")  # the first comparison is slow
    with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes, for huge integers
    for line in sys.stdin:
        pair = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, DEADLINE)
        same = symbolically_equal(pair["said"], pair["true"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": same}), flush=True)


if __name__ == "__main__":
    main()
