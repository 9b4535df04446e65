"""formulas.py: pairs whose equality is known, and children that stop, hang, die and fork."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import formulas
from formulas import boxed, equal

EQUAL = [  # (truth, said)
    # as symbols
    (r"\frac{1}{2}", "0.5"), ("1/2", r"\frac12"), ("0.75", r"\dfrac{3}{4}"), ("5", "x = 5"),
    (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2"), (r"\{1,2\}", r"\{2, 1\}"), ("12", "12.0"),
    (r"\left(1,2\right)", "(1, 2)"), (r"\sqrt{5}+\sqrt{6}", r"\sqrt{11+2\sqrt{30}}"),
    ("2x+1=y", "y=2x+1"), (r"5\pm 1", "4,6"), (r"\frac{5x}{2}", "2.5x"), (r"x^{0.5}", r"\sqrt{x}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}"),
    (r"\frac{1}{2^{99}}", "2^{-99}"), ("0.0000003", r"3\cdot 10^{-7}"), ("7,7", "7,7"), ("7,8", "7; 8"),
    # a decimal truth at the digits that it shows
    ("0.33", "1/3"), ("0.33", "0.3333"), ("-0.33", r"-\frac{1}{3}"), ("3.14", r"\pi"),
    ("0.5", "1/2"), ("1.50", "1.5"), ("(0.33, 0.67)", "(1/3, 2/3)"), ("0.3", "0.25"),
    # units and degrees
    ("30", "30°"), ("30", r"30\degree"), ("30°", r"30^\circ"), ("30^{\\circ}", "30 degrees"),
    ("69{degrees}", "69"), ("12", "12 cm^2"), ("12", r"12 \, cm^{2}"), ("12", r"12\text{ cm}"),
    (r"12\text{ cm}", "12 centimetres"), (r"12\text{ square cm}", "12 cm^2"), ("5", "5 dollars"),
    ("5", r"\$5"), (r"60\text{ mph}", "60"), ("60 miles per hour", r"60\text{ mi}/\text{h}"),
    ("12", "12 m^2"), ("12", "12 m/s"), ("12", "12 m/s^{2}"), ("12", "12 cm/s^2"), ("12 m/s", r"12\text{ m}/\text{s}"),
    ("30", "30°C"), ("30", "30 ℃"), ("30", r"30^{\circ}\mathrm{C}"), ("30°C", r"30^\circ C"), ("30", "30{°}"),
    ("12{ cm}^2", "12"), ("12", "12 sq. units"), ("12 cm^2", "12 sq. cm"),
    ("12", r"12\text{ apples}"), (r"\sin 30°", r"\sin(30^{\circ})"), ("2", "2 h"), ("2", "2 kW"), (r"2\pi", r"2π\text{ cm}"),
    # Unicode
    (r"\sqrt{3}", "√3"), (r"\frac{1}{2}", "½"), (r"\frac{3}{2}", "1½"), ("x^2", "x²"),
    ("x^{-12}", "x⁻¹²"), ("3", "３"), (r"x \le 5", "x≤5"), (r"\frac{\pi}{4}", "π/4"), ("-2", "−2"),
    (r"[1,2)\cup(3,4]", "(3,4]∪[1,2)"), (r"\infty", "∞"), ("31_8", "31₈"), (r"2\times 3", "2×3"),
    # spellings of the same
    ("1234", "1,234"), ("1234", "1{,}234"), ("31_8", "31_{8}"), (r"\sqrt{3}", "sqrt(3)"),
    (r"\text{east}", "East"), ("EAST", r"\text{east}"), ("6\\%", "0.06"), ("12.5\\%", "1/8"),
    ("12000000", "12 million"), (r"6\%", "6 percent"), (r"\text{no solution}", "No solution"),
    ("Yes", r"\text{yes}"), ("2 + 2i", "2(1+i)"), (r"\angle ABC", "∠ABC"), ("2(x+1)", "2x + 2"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
     r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("12", "13"), ("(1,2)", "(2,1)"), ("y", "x"), ("5", "5 or 6"), ("5", "1,2,3,4,5"),
    ("5", "4$ or $5"), ("6", r"5\pm 1"), ("5", "4 < x < 6"), ("5", ""), ("5", "abc def"),
    ("5", r"\frac{1}{0}"), ("(5,3)", "(4,2)"), ("[1,2]", "(1,2)"),
    # an exact truth wants an exact answer
    (r"\frac{1}{3}", "0.33"), ("1/3", "0.333333"), ("1/7", "0.142857"), (r"\pi", "3.14159265"),
    (r"\sqrt{2}", "1.41421356"), ("0.0000003", "0.0000004"), ("10^{-20}", "10^{-21}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"),
    ("3.0000001", "3.0000002"), ("0.33", "0.3"), ("0.33", "0.34"), ("0.33", "-0.33"), ("0.1", "0"),
    ("0.3", "0.24"), ("0.3", "0.35"),  # 0.35 rounds to 0.4
    # bases, letters, percents, repeats, units
    (r"\angle ABC", r"\angle ACB"), (r"\text{A and B}", r"\text{A and C}"), ("2i", "2"),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 3\end{pmatrix}"),
    ("31_8", "31_9"), ("31_8", "31"), ("R", "r"), ("AB", "ab"), ("A_1", "a_1"), ("V_1", "V_2"),
    ("6", r"6\%"), (r"6\%", "6"), ("12", "12 million"), ("12", r"12\text{ million}"),
    ("7", "7,7"), ("7,7", "7"), ("7,8", "7,7,8"), (r"\{1,2\}", r"\{1,1\}"), ("7", "7 or 7"), ("7", "7; 7"),
    ("12 m^2", "12 m^3"), ("12 m/s", "12 m/s^2"), ("30°C", "30°F"), ("2x", "2 m^2"), ("12m^2", "12"), ("2 m n", "2"),
    ("12 cm", "12 m"), ("12 cm", "12 cm^2"), ("60 mph", "60 km/h"), ("12m", "12"), ("12m", "12s"), ("2h", "2 h^2"),
    # what a flattened Unicode would say
    ("x2", "x²"), ("12", "½"), ("11/2", "1½"), ("x^2", "x₂"),
]  # fmt: skip


@pytest.mark.parametrize(("true", "said"), EQUAL)
def test_equal(true, said):
    assert equal(said, true) is True


@pytest.mark.parametrize(("true", "said"), DIFFERENT)
def test_different(true, said):
    assert equal(said, true) is False


def test_exact_is_the_same_text():
    assert equal("0.5", "0.5", exact=True) is True
    assert equal("0.5", "1/2", exact=True) is False
    assert equal("", "", exact=True) is False


def test_boxed():
    assert boxed(r"\boxed{1} or \boxed{\frac{1}{\sqrt{2}}} so") == r"\frac{1}{\sqrt{2}}"
    assert boxed(r"\boxed{$7$}") == "7"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed(r"\boxed{5") == ""
    assert boxed(" $$ 5 $$ ") == "5"
    assert boxed(r"\$5") == r"\$5"


def never(*_):
    raise AssertionError("this pair needs no symbols")


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        ("1,000", "1000", True),
        ("17", "18", False),
        ("9**9**9**9", "5", False),
        ("9^{9^{9^9}}", "5", False),
        ("9⁹⁹⁹⁹⁹⁹", "5", False),
        ("10^{99999}", "5", False),
        ("99999!", "5", False),
        ("9!!!", "5", False),
        ("1+" * 500 + "1", "501", False),  # longer than what is compared
        ("9" * 5000, "5", False),
    ],
)
def test_what_is_decided_without_symbols(said, true, expected, monkeypatch):
    monkeypatch.setattr(formulas, "equal_in_child", never)
    assert equal(said, true) is expected


# ---- children ----

ENDLESS = r"(9\cdot 1)^{(9\cdot 1)^{9\cdot 1}}"  # gets past the screen, into one call of C


def idle():
    """The children that wait for work."""
    waiting = formulas.idle_children(os.getpid())
    children = [waiting.get() for _ in range(2)]
    for child in children:
        waiting.put(child)
    return children


def test_what_is_cut_twice_is_undecided_and_the_child_replaced():
    before = {child.pid for child in idle()}
    assert equal(ENDLESS, "5", seconds=0.3) is None
    assert len(before & {child.pid for child in idle()}) == 1
    assert equal(r"\frac{3}{6}", "0.5") is True


def processor_seconds(child):
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def test_the_limit_is_set_anew_for_each_pair():
    child, _ = idle()
    assert formulas.ask(child, "(x+1)^2", "x^2+2x+1", 5.0)  # ready, and warm
    start, k = processor_seconds(child), 1
    while processor_seconds(child) - start < 2.5:
        k += 1
        reply = formulas.ask(child, f"(x+{k})^3", f"x^3+{3 * k}x^2+{3 * k * k}x+{k**3}", 2.0)
        assert reply == '{"equal": true}\n'


def test_a_stopped_child_is_waited_for():
    """Time by the clock changes no result: the child stands still for longer than its limit."""
    children = idle()
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)

    def resume():
        for child in children:
            os.kill(child.pid, signal.SIGCONT)

    timer = threading.Timer(2.0, resume)
    timer.start()
    start = time.monotonic()
    assert equal("(x+2)^2", "x^2+4x+4", seconds=1.0) is True
    assert time.monotonic() - start > 1.5
    timer.join()
    assert {child.pid for child in idle()} == {child.pid for child in children}  # none was cut


def test_a_silent_child_is_given_up_by_the_clock(monkeypatch):
    children = idle()
    monkeypatch.setattr(formulas, "BACKSTOP", 0.5)
    monkeypatch.setattr(formulas, "start_child", stopped_child)
    for child in children:
        os.kill(child.pid, signal.SIGSTOP)
    assert equal("(x+3)^2", "x^2+6x+9") is None
    monkeypatch.undo()
    formulas.idle_children.cache_clear()
    for child in children:
        child.kill()
    assert equal("(x+3)^2", "x^2+6x+9") is True


def stopped_child():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_child_that_dies_is_replaced_and_the_pair_decided():
    for child in idle():
        child.kill()
        child.wait()
    assert equal("(x+4)^2", "x^2+8x+16") is True
    assert equal("(x+5)^2", "x^2+10x+25") is True


def test_in_threads():
    results = [None] * 8

    def work(k):
        results[k] = equal(f"\\frac{{{k}}}{{2}}", f"{k / 2}0")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1:] == [True] * 7


def test_in_a_forked_process():
    assert equal(r"\frac{2}{4}", "0.5") is True
    child = os.fork()
    if child == 0:
        os._exit(0 if equal(r"\frac{4}{8}", "0.5") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(r"\frac{5}{10}", "0.5") is True


@pytest.mark.parametrize("true, said, same", [
    ("f(x)", "f'(x)", False), ("x", "x'", False), ("30°", "30'", False), ("f'(x)", "f'(x)", True),
    ("x'+1", "1+x'", True), ("2x", "f'(x)=2x", True),
])
def test_a_prime_is_part_of_a_name(true, said, same):
    assert formulas.equal(said, true) is same
