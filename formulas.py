r"""Are two formulas equal? An answer in bounded time, whatever the formulas are.

    python formulas.py compare    # {"said", "true", "seconds"} a line in, {"equal"} a line out

An exact truth wants an exact answer: 1/3 is not 0.333333, and 6 is not 6\%. A decimal truth is met
by what rounds to it at the digits that it shows: 0.33 by 1/3 and by 0.3333, not by 0.3. A unit may
be left out, but two units that are known must be the same. R is not r, but East is east. Unicode
reads as its LaTeX.

`equal` first compares how both are spelt. Symbols are compared by math-verify, whose own timeouts
do not work within C, in a child process: the kernel ends it when its processor time is up.
"""
import contextlib
import functools
import json
import os
import queue
import re
import resource
import select
import signal
import sys
import unicodedata
from decimal import Decimal
from subprocess import DEVNULL, PIPE, Popen

from needs import check, library

SECONDS = 10.0  # processor time of a comparison: the same result on a busy machine
BACKSTOP = 300.0  # seconds by the clock, for a child that gets no processor at all
LONGEST = 400  # characters of a formula that is worth comparing
# Powers of powers, long exponents, factorials of long numbers: hours of work in few characters.
POWER = r"(?:\^|\*\*)[{(\s]*-?"
TOO_HARD = re.compile(rf"{POWER}[0-9]+[)}}\s]*{POWER}|{POWER}[0-9]{{5,}}|[0-9]{{4,}}\s*!|!\s*!")


# ---- §1 spellings --------------------------------------------------------------------------------
def boxed(text):
    r"""What stands in the last \boxed{…}, or else in $…$; "" if its braces do not balance."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return undollared(text)
    content = text[start + len("\\boxed{") :][: 10 * LONGEST]
    depth = 1
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


# Unicode as LaTeX writes it: first what NFKC would flatten (x² to x2), and after it single signs.
RUNS = (
    ("⁄", "/"), ("[º˚]", "°"),
    ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"), ("[₀-₉]+", r"_{\g<0>}"), ("[¼-¾⅐-⅞]", r"\\frac{\g<0>}"),
    (r"√\s*([0-9.]+|[a-zA-Z])|√\s*\(([^()]*)\)", r"\\sqrt{\1\2}"),
)  # fmt: skip
SIGNS = {"⁄": "}{", "√": r"\sqrt", "÷": "/", "−": "-", "–": "-"}
COMMANDS = """×times ·cdot ⋅cdot ≤le ≥ge ≠ne ±pm ∞infty ∅emptyset ∪cup ∩cap ∈in ∠angle △triangle
αalpha βbeta γgamma δdelta θtheta λlambda μmu πpi ρrho σsigma φphi ωomega ΔDelta ΩOmega"""
SIGNS |= {command[0]: f"\\{command[1:]} " for command in COMMANDS.split()}
TIDY = (  # several ways to write the same; the order counts
    (r"\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\!|\\?\$|(?<=[0-9])\\,(?=[0-9]{3})", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),  # after \\ a row of a matrix begins
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:text|mathrm|mbox|textrm|textbf|mathbf|textit)(?=\{)", r"\\text"),
    (r"\^\s*\{?\\circ(?![a-zA-Z])\}?|\\degree(?![a-zA-Z])", "°"),
    (r"(?<![\\a-zA-Z])(sqrt|pi)(?![a-zA-Z])", r"\\\1 "),
    (r"\\sqrt *(?:\(([^()]*)\)|([0-9]))", r"\\sqrt{\1\2}"),
    (r"\{,\}", ","),
    (r"\\text\{\s*(percent|thousand|million|billion)\s*\}", r" \1"),
    (r"(?<=[0-9])\s*percent(?![a-z])", "%"),
    (r"(?<=[0-9])\s*thousand(?![a-z])", r"\\cdot 1000"),
    (r"(?<=[0-9])\s*million(?![a-z])", r"\\cdot 1000000"),
    (r"(?<=[0-9])\s*billion(?![a-z])", r"\\cdot 1000000000"),
    (r"(?<![0-9.])([0-9]+)\s*\\?%", r"\\frac{\1}{100}"),
)  # fmt: skip
SAME_TEXT = (
    (r"\\text\{([^{}]*)\}", r"\1"), (r"\s", ""), (r"\.0*$", ""), (r"([_^])\{(\w)\}", r"\1\2"),
)  # fmt: skip


def tidy(formula: str) -> str:
    r"""A formula in plain LaTeX, its meaning unchanged: ½ as \frac{1}{2}, √3 as \sqrt{3}."""
    if not formula.isascii():
        for pattern, spelling in RUNS:
            formula = re.sub(pattern, spelling, formula)
        formula = unicodedata.normalize("NFKC", formula)
        formula = "".join(SIGNS.get(character, character) for character in formula)
    for pattern, spelling in TIDY:
        formula = re.sub(pattern, spelling, formula)
    formula = re.sub(r"(?<![0-9.])([0-9]*\.[0-9]+)\s*\\?%", hundredth, formula)
    if not re.search(r"[(\[]", formula):  # "(1,200)" is a point
        formula = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", formula)
    return formula.strip()


def hundredth(match):
    """12.5% is 0.125."""
    return f"{Decimal(match[1]).scaleb(-2):f}"


def spelt(formula: str) -> str:
    """A tidy formula without what two spellings of the same text differ in."""
    for pattern, spelling in SAME_TEXT:
        formula = re.sub(pattern, spelling, formula)
    words = re.fullmatch("[A-Za-z,.'-]{4,}|[A-Za-z][a-z]{1,2}", formula)  # not R, not AB
    return formula.lower() if words else formula


# ---- §2 units ------------------------------------------------------------------------------------
UNIT_NAMES = """° degree deg/mm millimeter millimetre/cm centimeter centimetre/dm decimeter
decimetre/m meter metre/km kilometer kilometre/in inch inches/ft foot feet/yd yard/mi mile/mph/mg
milligram/g gram/kg kilogram/lb pound/oz ounce/ton/ml mL milliliter millilitre/L l liter litre
/C/F/gallon/s second sec/min minute/h hour hr/day/week/month/year yr/dollar USD/euro EUR/cent/unit
/rad radian/N newton/J joule/kJ/W watt/kW/V volt/A ampere/Pa/Hz/K/mol/acre/point/student/people"""
UNITS = {name: line.split()[0] for line in UNIT_NAMES.split("/") for name in line.split()}
UNITS |= {f"{name}s": short for name, short in UNITS.items() if len(name) > 1}
SIZE = r"(?:\s*\^\s*\{?[23]\}?)?"
TEXT = rf"\\text\{{[^{{}}]*\}}{SIZE}"
LONG = "|".join(name for name in UNITS if len(name) > 1)
NAME = rf"\{{?\s*(?:{LONG})(?![a-zA-Z])\}}?{SIZE}"
PER = rf"(?:\s*(?:/|per)\s*(?:{NAME}|[hs]{SIZE}))?"
DEGREES = r"\{?°\}?(?:\s*(?:\\text\{)?\s*[CF]\s*\}?)?"
QUANTITIES = [re.compile(pattern, re.DOTALL) for pattern in (
    rf"(.*[0-9)}}\]]|.*\\pi)\s*({DEGREES}|(?:(?:square|sq\.?|cubic)\s+)?{NAME}{PER})",
    rf"(.*[0-9]|.*[0-9].*[)}}\]]|.*\\pi)\s*({TEXT}(?:\s*/\s*{TEXT})?)",
    rf"(-?[0-9.]+)\s+([mgslLhNJWVAK]{SIZE}{PER})",  # "2h" may be a product, "2 h" is a time
)]  # fmt: skip


def quantity(formula: str) -> tuple[str, str]:
    r"""-> a tidy formula without its unit; the unit as in UNITS ("cm^2"), "" if none is known."""
    found = (pattern.fullmatch(formula) for pattern in QUANTITIES)
    match = next((match for match in found if match), None)
    if not match:
        return formula, ""
    unit = re.sub(r"\\text|[{}]", " ", match[2])
    unit = re.sub(r"\b(?:square|sq\.?)\s+([a-zA-Z]+)", r"\1^2", unit)
    unit = re.sub(r"\bcubic\s+([a-zA-Z]+)", r"\1^3", unit)
    unit = re.sub(r"\s+per\s+", "/", unit)
    unit = re.sub(r"[a-zA-Z]+", lambda word: UNITS.get(word[0], "?"), unit)
    unit = re.sub(r"\s", "", unit)
    return match[1], "" if "?" in unit else unit


# ---- §3 symbols, in a child process --------------------------------------------------------------
DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")


def symbolically_equal(said: str, true: str) -> bool:
    """Whether math-verify finds two tidy formulas equal, with its tolerances replaced by ours."""
    grader = library("math_verify.grader", "'math-verify[antlr4_13_2]'")
    sympy = library("sympy", "sympy")
    check(hasattr(grader, "sympy_numeric_eq"), "math-verify compares otherwise: see requirements")
    digits_of = {}  # of the truth's decimals, how many they show
    for whole, digits in DECIMAL.findall(true):
        digits_of[sympy.Rational(f"{whole}.{digits}")] = len(digits)

    def same_number(true, said, *_):
        if isinstance(true, sympy.MatrixBase) or isinstance(said, sympy.MatrixBase):
            return False  # their symbols are compared next
        true, said = grader.safe_sympy_doit(true), grader.safe_sympy_doit(said)
        difference = true - said
        if difference.free_symbols:
            return False
        digits = digits_of.get(abs(true))
        if digits is None:
            return difference.equals(0) is True  # exactly, not to some digits
        # round(said, digits) = true, halves away from 0
        rounded = sympy.floor(abs(said) * 10**digits + sympy.Rational(1, 2))
        return bool(rounded == abs(true) * 10**digits and (said >= 0) == (true >= 0))

    grader.sympy_numeric_eq = same_number  # its own: 15 digits, or 6 decimals, and 6% is 6
    said, true = parsed(said), parsed(true)
    return repeats(said) == repeats(true) and grader.verify(true, said, timeout_seconds=None)


def parsed(formula):
    """-> what math-verify makes of a formula, with exact decimals, and R apart from r."""
    parser = library("math_verify.parser", "'math-verify[antlr4_13_2]'")
    reader = library("latex2sympy2_extended.latex2sympy2", "'math-verify[antlr4_13_2]'")
    letters = reader.ConversionConfig(lowercase_symbols=False)
    parser.latex2sympy = functools.partial(reader.latex2sympy, conversion_config=letters)
    formula = DECIMAL.sub(decimal_fraction, formula).replace("°", r"^{\circ}")
    formula = re.sub(r"(?<=[0-9])i(?![a-zA-Z])", " i", formula)  # 2i, as i, is not real
    repairs = parser.NormalizationConfig(malformed_operators=True, nits=True)  # units: §2
    how = [parser.LatexExtractionConfig(normalization_config=repairs)]
    return parser.parse(f"${formula}$", extraction_config=how, parsing_timeout=None)


def decimal_fraction(match):
    """0.25 is 25/100."""
    return rf"{{\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}}}"


def repeats(parts):
    """How many elements of a list, parsed, are there already: math-verify's sets hide them."""
    if type(parts[0]).__name__ not in ("FiniteSet", "Tuple"):
        return 0
    symbols, text = parts
    listed = re.split(r"[,;]|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])", text)
    return max(len(listed) - len(symbols.args), 0)  # 5 \pm 1 lists one and means two


def equal_in_child(said, true, seconds=SECONDS, children=None):
    """Let a child process compare; None if two of them in a row came to their end over it."""
    children = children or idle_children(os.getpid())
    child, reply = children.get(), ""
    try:
        reply = ask(child, said, true, seconds)
        if not reply:
            child = replaced(child)
            reply = ask(child, said, true, seconds)
    finally:
        if not reply:  # dead, or interrupted before it could answer
            child = replaced(child)
        children.put(child)  # at the end: a new one is ready when it is needed
    return json.loads(reply)["equal"] if reply else None


def ask(child, said, true, seconds):
    """The child's reply, "" if it died over it."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"said": said, "true": true, "seconds": seconds}), file=child.stdin)
        child.stdin.flush()
        waiting = select.poll()
        waiting.register(child.stdout)
        if waiting.poll(1000 * BACKSTOP):
            return child.stdout.readline()
    return ""


def start_child():
    command = [sys.executable, os.path.abspath(__file__), "compare"]
    return Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)


def replaced(child):
    child.kill()
    child.wait()
    return start_child()


@functools.lru_cache(maxsize=1)
def idle_children(process_id):
    """A queue of idle children, one queue a process: a fork must not use its parent's pipes."""
    children = queue.SimpleQueue()
    for _ in range(2):
        children.put(start_child())
    works = equal_in_child("x+x", "2x", children=children)
    check(works, "formulas can not be compared: pip install 'math-verify[antlr4_13_2]', or see "
          "`python formulas.py compare` fail")
    return children


# ---- §4 the comparison ---------------------------------------------------------------------------
WHOLE = re.compile("-?[1-9][0-9]*")
# 31_8 and \angle ABC: symbols know neither bases nor the order of letters in a name.
BASED = re.compile(r"[0-9]_|^\\(?:angle|triangle)(?![^=]*=)")


def primes(formula: str) -> int:
    return len(re.findall(r"'|′|\\prime", formula))


def equal(said: str, true: str, *, exact=False, seconds: float | None = None) -> bool | None:
    """Whether two formulas are equal; None if that is undecided when the processor time is up.

    exact: only the same text is. seconds: of a child's processor, for one of two tries (SECONDS).
    """
    if exact or not said or max(len(said), len(true)) > LONGEST:
        return said != "" and said == true
    said, true = tidy(said), tidy(true)
    if spelt(said) == spelt(true):
        return said != ""
    said, unit = quantity(said)
    true, true_unit = quantity(true)
    if unit and true_unit and unit != true_unit:
        return False
    plain, plain_true = spelt(said), spelt(true)
    if "=" not in plain + plain_true and primes(plain) != primes(plain_true):
        return False  # math-verify leaves them out: f(x) and f'(x), 30° and 30'
    whole = WHOLE.fullmatch(plain) and WHOLE.fullmatch(plain_true)
    other_case = plain.lower() == plain_true.lower()  # A_1 and a_1
    based = BASED.search(said) or BASED.search(true)
    hard = TOO_HARD.search(said) or TOO_HARD.search(true)
    if whole or other_case or based or hard:  # symbols would not help, or not end
        return plain == plain_true
    return equal_in_child(said, true, seconds or SECONDS)


def main() -> None:
    """The child: a pair a line, each within its time, or the end of this process."""
    symbolically_equal("\\frac{1}{2}", "0.5")  # the first comparison is slow
    with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes, for huge integers
    # The default action ends even one endless call to C: 9^(9^9).
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        pair = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, pair["seconds"])
        same = symbolically_equal(pair["said"], pair["true"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": same}), flush=True)


if __name__ == "__main__":
    main()
