"""The papers' claims in miniature, as tables: what is chosen, and each claim's arms and contrasts.

§1 rows · §2 what is chosen · §3 Perception-R1's claims

An arm is one trained (or only answered) policy; a contrast is what the claim says of some arms:
Σ weight · score is above 0. claims.py runs the arms, claims_report.py judges the contrasts.
[PR1] Perception-R1, arXiv 2504.07954: the papers' numbers are from its T1-T3 and T5, in percent.
"""
import re
from dataclasses import dataclass, replace

from tiny import BASE_SCENES as SCENE

GRPO, SFT = "grpo_vl.py", "sft_coldstart.py"  # what trains an arm
CHANCE = "chance"  # no policy: one fixed answer to all scenes (claims.py §5)


# §1 ───────────────────────────────────────── rows ───────────────────────────────────────────────
@dataclass(frozen=True)
class World:
    """A task as it is drawn, trained and answered."""
    task: str
    scene: str  # options of synthetic:TASK
    steps: int  # of GRPO
    sft_steps: int  # that take as long as those, whatever the machine (claims_pace.py)
    lr: float  # of GRPO
    sft_lr: float  # constant
    max_tokens: int  # longest answer
    prompts: int = 16  # a step, of GRPO and of SFT
    group: int = 8  # G
    schedule: str = "linear"  # of GRPO's learning rate
    think: str = "no"  # no, before, after
    reward_options: str = "{}"
    looked_at: int = 200  # held-out scenes that a step is looked at by
    samples: int = 500  # held-out scenes that are answered at the end


@dataclass(frozen=True)
class Arm:
    """`where what` is its name, as "grounding GRPO"."""
    where: str  # its place on the figure's x-axis
    what: str  # its mark there
    world: World
    script: str = ""  # GRPO, SFT or CHANCE; "": nothing is trained
    options: tuple[str, ...] = ()  # of the script, beside those that follow from the world
    start: str = ""  # the arm to start from, or to answer; "CLAIM/ARM" of another; "": the base
    # which step is answered: last; best, by held-out accuracy; or that with as many prompts or
    # tokens as the arm `like` had
    at: str = "last"
    like: str = ""
    blind: bool = False  # answered on grey images

    @property
    def name(self) -> str:
        return f"{self.where} {self.what}"

    @property
    def slug(self) -> str:
        """The name as a file's."""
        return re.sub(r"\W+", "-", self.name).lower()


@dataclass(frozen=True)
class Contrast:
    """The claim says that Σ weight · score is above 0."""
    text: str
    weights: dict[str, float]  # arm's name: weight
    paper: str = ""  # its numbers
    metric: str = "greedy"  # or sampled, pass@8, AP
    headline: bool = False  # it stands in the README


@dataclass(frozen=True)
class Claim:
    title: str
    arms: list[Arm]  # an arm stands after those that it waits for
    contrasts: list[Contrast]
    ordinal: bool = False  # the places on the x-axis have an order: marks are joined
    not_drawn: tuple[str, ...] = ()  # kinds of arms so far off that the others could not be read
    note: str = ""


# §2 ─────────────────────────── what is chosen, on seeds 10 and above ────────────────────────────
# The scenes are those that --preset base is trained on. GRPO was tried at 1e-4 and 2e-4 on seed 10,
# once or twice a task (results/claims_tried.jsonl): the better one stands, by differences that are
# within noise. SFT's 3e-4 is the demo's and was not tuned further. Steps of GRPO are what one core does
# in one to three minutes, SFT's what it does in as many (results/claims_pace.jsonl, to tens).
GROUNDING = World(
    task="grounding", scene=f"{SCENE}&distractors=1-3",
    steps=100, sft_steps=320, lr=1e-4, sft_lr=3e-4, max_tokens=32)
COUNTING = World(
    task="counting", scene=f"{SCENE}&objects=1-4&distractors=1-2",
    steps=100, sft_steps=490, lr=2e-4, sft_lr=3e-4, max_tokens=80)
OCR = World(
    task="ocr", scene="size=84x84&objects=1-1&numbers=1",
    steps=100, sft_steps=210, lr=2e-4, sft_lr=3e-4, max_tokens=24)
DETECTION = World(
    task="detection", scene=f"{SCENE}&objects=1-6&coloured=1",
    steps=40, sft_steps=270, lr=1e-4, sft_lr=3e-4, max_tokens=160)
TASKS = (GROUNDING, COUNTING, OCR, DETECTION)

CROWD = f"{SCENE}&coloured=1"  # P2: detection of exactly so many objects
OBJECTS = (1, 2, 4, 6)
SFT_STEPS = {1: 130, 2: 210, 4: 260, 6: 310}  # of objects: as sft_steps
GROUPS = (2, 4, 8, 16, 32)  # P5: G
LR_OF_GROUP: dict[int, float] = {}  # learning rates of other G than 8; empty: not tuned
THOUGHT = 48  # P3: more tokens for an answer with thinking


# §3 ──────────────────────────────── Perception-R1's claims ──────────────────────────────────────
LIFT = {  # [PR1 T1, T2, T3] base → RL
    "grounding": "RefCOCO+ val, mean, 58.4 → 62.6", "counting": "PixMo-Count val 60.2 → 78.1",
    "ocr": "PageOCR en, 1 − edit distance, 92.0 → 97.2", "detection": "COCO AP 16.1 → 31.9"}
OVER_SFT = {  # [PR1 T5] SFT → RL
    "grounding": "RefCOCO+ val 80.7 → 81.7", "counting": "PixMo-Count val 58.0 → 78.1",
    "ocr": "PageOCR F1 97.2 → 98.2", "detection": "COCO AP 25.9 → 31.9"}
NO_THINKING = {  # [PR1 T5] with → without thinking
    "grounding": "RefCOCO+ val 67.9 → 81.7", "counting": "PixMo-Count val 74.9 → 78.1",
    "ocr": "PageOCR F1 93.8 → 98.2", "detection": "COCO AP 25.7 → 28.1"}
NO_THINKING_OF_ALL = "+13.8, +3.2, +4.4, +2.4"
BOXES_ALONE = (
    "Detection's score is the F1 of boxes, whatever their names; AP counts the names. base/ names a "
    "lone object rightly; of several it finds the boxes and misnames most. SFT trains for as many "
    "steps as take GRPO's time, which was measured once, side by side on a seed for choosing "
    "(`benchmarks/claims_pace.py`): the seconds of these runs differ with what else the machine did. "
    "Reading has no format-only arm, as its answers have no form that could be wrong.")
ONE_OBJECT = (
    "One object is at the ceiling of its F1, so that RL has nothing to gain there; and as answers "
    "about more objects are longer, GRPO's time is that of more and more steps of SFT. Six objects "
    "stand for many, as base/ has seen no more. Where the arms after SFT start, with six, SFT still "
    "improves, as the arm that is twice as long shows: no arm starts where it no longer does.")
NO_BETTER = (
    "The paper does not ask this; it guards the other claims. A blind policy can do no better than "
    "chance, the best fixed answer (claims.py §5): \"reversed\" would be an alarm.")
MATCHING = "RL over SFT: PixMo-Count +20.1, COCO AP +6.0; RefCOCO+ +1.0, PageOCR F1 +1.0"


def over(first: str, second: str) -> dict[str, float]:
    """Weights of "the first scores more than the second"."""
    return {first: 1.0, second: -1.0}


def p1() -> Claim:
    """RL against the base, against SFT, and against rewards that know nothing."""
    arms, contrasts = [], []
    for world in TASKS:
        task = world.task
        base, grpo, sft = f"{task} base", f"{task} GRPO", f"{task} SFT"
        best, fair, noise = f"{sft}, best step", f"{sft}, same prompts", f"{task} random reward"
        shown, lift, over_sft = task, LIFT[task], OVER_SFT[task]
        if task == "detection":  # the paper's are of AP, see below
            shown, lift, over_sft = "detection, F1 of boxes", "", ""
        arms += [
            Arm(task, "base", world),
            Arm(task, "GRPO", world, GRPO),
            Arm(task, "random reward", world, GRPO, control("random_reward")),
            Arm(task, "SFT", world, SFT),
            Arm(task, "SFT, best step", world, start=sft, at="best"),
            Arm(task, "SFT, same prompts", world, start=sft, at="prompts", like=grpo),
        ]
        contrasts += [
            Contrast(f"{shown}: base → GRPO", over(grpo, base), lift, headline=True),
            Contrast(f"{task}: base → GRPO, sampled", over(grpo, base), metric="sampled"),
            Contrast(f"{task}: base → GRPO, pass@8", over(grpo, base), metric="pass@8"),
            Contrast(f"{shown}: SFT, same prompts → GRPO", over(grpo, fair), over_sft),
            Contrast(f"{task}: SFT, as long → GRPO", over(grpo, sft)),
            Contrast(f"{task}: SFT, its best step → GRPO", over(grpo, best)),
            Contrast(f"{task}: random reward → GRPO", over(grpo, noise)),
        ]
        if task != "ocr":  # whose answers have no form that could be wrong
            arms.append(Arm(task, "format only", world, GRPO, control("format_only")))
            formed = over(grpo, f"{task} format only")
            contrasts.append(Contrast(f"{task}: format only → GRPO", formed))
    lift = over("detection GRPO", "detection base")
    learned = over("detection GRPO", "detection SFT, same prompts")
    contrasts += [
        Contrast("detection: base → GRPO, AP", lift, LIFT["detection"], "AP", headline=True),
        Contrast("detection: SFT, same prompts → GRPO, AP", learned, OVER_SFT["detection"], "AP"),
        where_matched("same prompts", MATCHING),
        where_matched("best step"),
        of_all_tasks("base → GRPO", "GRPO", "base"),
        of_all_tasks("SFT, same prompts → GRPO", "GRPO", "SFT, same prompts", headline=True),
        of_all_tasks("SFT, same prompts → GRPO, sampled", "GRPO", "SFT, same prompts",
                     metric="sampled"),
        of_all_tasks("SFT, same prompts → GRPO, pass@8", "GRPO", "SFT, same prompts",
                     metric="pass@8"),
        of_all_tasks("SFT, its best step → GRPO", "GRPO", "SFT, best step", headline=True),
        of_all_tasks("random reward → GRPO", "GRPO", "random reward"),
    ]
    return Claim("RL lifts each perception task over its base", arms, contrasts, note=BOXES_ALONE,
                 not_drawn=("random reward", "format only"))


def control(reward: str) -> tuple[str, ...]:
    return "--reward", f"benchmarks/control_rewards.py:{reward}"


def where_matched(kind: str, paper="") -> Contrast:
    """GRPO over a kind of SFT where objects are matched (counting, detection), less where not."""
    weights = {}
    for task, sign in (("counting", 0.5), ("detection", 0.5), ("grounding", -0.5), ("ocr", -0.5)):
        weights[f"{task} GRPO"] = sign
        weights[f"{task} SFT, {kind}"] = -sign
    text = f"GRPO over SFT, {kind}: more in counting, detection than in grounding, OCR (see P2)"
    return Contrast(text, weights, paper)


def p2() -> Claim:
    """GRPO, whose reward knows no order of objects, against SFT on a random and a fixed order; with
    the fewest and the most objects also once SFT has had its time."""
    arms, contrasts = [], []
    for count in OBJECTS:
        where = objects(count)
        scene, as_long = f"{CROWD}&objects={count}-{count}", SFT_STEPS[count]
        world = replace(DETECTION, scene=scene, sft_steps=as_long, samples=300)
        in_order = replace(world, scene=f"{world.scene}&ordered=1")  # the same scenes
        grpo, free, fixed = f"{where} GRPO", f"{where} SFT", f"{where} SFT, sorted"
        arms += [
            Arm(where, "base", world),
            Arm(where, "GRPO", world, GRPO),
            Arm(where, "SFT", world, SFT, at="best"),
            Arm(where, "SFT, sorted", in_order, SFT, at="best"),
        ]
        contrasts += [
            Contrast(f"{where}: SFT → GRPO", over(grpo, free)),
            Contrast(f"{where}: SFT → GRPO, sampled", over(grpo, free), metric="sampled"),
            Contrast(f"{where}: SFT → GRPO, AP", over(grpo, free), metric="AP"),
            Contrast(f"{where}: SFT, sorted → GRPO", over(grpo, fixed)),
            Contrast(f"{where}: SFT → SFT, sorted", over(fixed, free)),
        ]
        if count in (OBJECTS[0], OBJECTS[-1]):
            after, again = f"{where} GRPO, after SFT", f"{where} SFT, twice as long"
            arms += [
                Arm(where, "GRPO, after SFT", world, GRPO, start=free),
                Arm(where, "SFT, twice as long", world, SFT, start=free, at="best"),
            ]
            contrasts += [
                Contrast(f"{where}: SFT → SFT, twice as long", over(again, free)),
                Contrast(f"{where}: SFT, twice as long → GRPO, after SFT", over(after, again)),
                Contrast(f"{where}: SFT, twice as long → GRPO, after SFT, sampled",
                         over(after, again), metric="sampled"),
            ]
    contrasts += [
        more_with_objects("GRPO", "SFT", MATCHING, headline=True),
        more_with_objects("GRPO", "SFT, sorted"),
        more_with_objects("GRPO, after SFT", "SFT, twice as long", headline=True),
    ]
    return Claim("RL beats SFT where many objects are to be matched", arms, contrasts, ordinal=True,
                 note=f"{BOXES_ALONE} {ONE_OBJECT}")


def objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count} objects"


def more_with_objects(rl: str, sft: str, paper="", *, headline=False) -> Contrast:
    """RL over SFT with the most objects, less that with one."""
    many, one = objects(OBJECTS[-1]), objects(OBJECTS[0])
    weights = {
        f"{many} {rl}": 1.0,
        f"{many} {sft}": -1.0,
        f"{one} {rl}": -1.0,
        f"{one} {sft}": 1.0,
    }
    text = f"from {sft} to {rl}: the gain with {many}, less that with {one}"
    return Contrast(text, weights, paper, headline=headline)


def p3() -> Claim:
    """Answers alone, thoughts before, thoughts after: at as many steps, and at as many tokens.

    Half as many steps as P1. The learning rate is constant, the mean of P1's, so that a step is the
    same whichever step is the last.
    """
    arms, contrasts = [], []
    for own in TASKS:
        world = replace(
            own, schedule="constant", lr=own.lr / 2, steps=own.steps // 2, samples=300)
        task, plain = world.task, f"{world.task} plain"
        arms += [Arm(task, "base", world), Arm(task, "plain", world, GRPO)]
        for form, what in (("before", "think"), ("after", "think after")):
            thought = replace(world, think=form, max_tokens=world.max_tokens + THOUGHT)
            long, same = f"{task} {what}", f"{task} {what}, same tokens"
            base, base_long = f"{task} base", f"{task} base, {what}"
            arms += [
                Arm(task, f"base, {what}", thought),
                Arm(task, what, thought, GRPO),
                Arm(task, f"{what}, same tokens", thought, start=long, at="tokens", like=plain),
            ]
            paper = NO_THINKING[task] if form == "before" and task != "detection" else ""  # is AP
            contrasts += [
                Contrast(f"{task}: {what} → plain", over(plain, long), paper),
                Contrast(f"{task}: {what} → plain, same tokens", over(plain, same)),
                Contrast(f"{task}: {what} → plain, of the base", over(base, base_long)),
            ]
    for what in ("think", "think, same tokens", "think after"):
        paper = NO_THINKING_OF_ALL if what == "think" else ""
        in_readme = what != "think after"
        contrasts.append(of_all_tasks(f"{what} → plain", "plain", what, paper, headline=in_readme))
    for what in ("think", "think after"):
        contrasts.append(more_gained(what))
    return Claim("thinking does not help perception", arms, contrasts)


def of_all_tasks(text: str, first: str, second: str, paper="", *, metric="greedy",
                 headline=False) -> Contrast:
    """The first kind of arm scores more than the second, in the mean over tasks."""
    weights = {}
    for world in TASKS:
        weights[f"{world.task} {first}"] = 1 / len(TASKS)
        weights[f"{world.task} {second}"] = -1 / len(TASKS)
    return Contrast(f"mean of {len(TASKS)} tasks: {text}", weights, paper, metric, headline)


def more_gained(what: str) -> Contrast:
    """Plain answers gain more over the base's plain ones than thinking over the base's thinking."""
    weights = {}
    for world in TASKS:
        weights[f"{world.task} plain"] = 1 / len(TASKS)
        weights[f"{world.task} base"] = -1 / len(TASKS)
        weights[f"{world.task} {what}"] = -1 / len(TASKS)
        weights[f"{world.task} base, {what}"] = 1 / len(TASKS)
    text = f"mean of {len(TASKS)} tasks: {what} → plain, what RL added to each"
    return Contrast(text, weights, headline=what == "think")


def p5() -> Claim:
    """G at as many prompts a step, and at as many rollouts a step; half as many steps as P1.

    The paper's figure is of grounding and counting; here it is counting alone.
    """
    arms, contrasts = [Arm("no RL", "base", COUNTING)], []
    for group in GROUPS:
        where = f"G = {group}"
        lr = LR_OF_GROUP.get(group, COUNTING.lr)
        world = replace(COUNTING, group=group, lr=lr, steps=COUNTING.steps // 2)
        arms.append(Arm(where, "same prompts", world, GRPO))
        if group == COUNTING.group:  # one run for both
            arms.append(Arm(where, "same rollouts", world, start=f"{where} same prompts"))
        else:
            fewer = replace(world, prompts=COUNTING.prompts * COUNTING.group // group)
            arms.append(Arm(where, "same rollouts", fewer, GRPO))
    for what in ("same prompts", "same rollouts"):
        low, high = f"G = {GROUPS[0]}", f"G = {GROUPS[-1]}"
        gain = over(f"{high} {what}", f"{low} {what}")
        text = f"counting: {low} → {GROUPS[-1]}, {what}"
        contrasts.append(Contrast(text, gain, "Fig. 2: rises (no numbers)", headline=True))
        contrasts.append(slope(what))
    note = "" if LR_OF_GROUP else "The learning rate was tuned for G = 8 alone."
    return Claim("more rollouts help", arms, contrasts, ordinal=True, note=note)


def slope(what: str) -> Contrast:
    """The gain a doubling of G, by least squares: Σ (x − x̄)·y / Σ (x − x̄)², x = 1, 2, 3, 4, 5."""
    weights = {}
    for group, distance in zip(GROUPS, (-2, -1, 0, 1, 2), strict=True):
        weights[f"G = {group} {what}"] = distance / 10
    return Contrast(f"counting: a doubling of G, {what}", weights)


def c1() -> Claim:
    """P1's policies with their eyes and without; `chance`: the best fixed answer to all scenes."""
    arms, contrasts = [], []
    for world in TASKS:
        task = world.task
        arms.append(Arm(task, "chance", world, CHANCE))
        for what in ("base", "GRPO", "SFT, best step"):
            seeing, blind = f"{task} {what}", f"{task} {what}, blind"
            arms.append(Arm(task, what, world, start=f"P1/{seeing}"))
            arms.append(Arm(task, f"{what}, blind", world, start=f"P1/{seeing}", blind=True))
            guess = f"{task}: {what}, blind → chance"
            contrasts += [
                Contrast(f"{task}: {what}, blind → seeing", over(seeing, blind)),
                Contrast(guess, over(f"{task} chance", blind)),
            ]
    contrasts += [
        of_all_tasks("GRPO, blind → seeing", "GRPO", "GRPO, blind", headline=True),
        of_all_tasks("GRPO, blind → chance", "chance", "GRPO, blind"),
    ]
    return Claim("the answer is in the picture", arms, contrasts, note=NO_BETTER)


def all_claims() -> dict[str, Claim]:
    return {"P1": p1(), "P2": p2(), "P3": p3(), "P5": p5(), "C1": c1()}
