"""What the ranks of a test do; each function runs on every rank (conftest.Pair) or on one alone."""
import json
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict as dist_state

import data as datasets
import fsdp
import grpo_vl
import run_folder
import training

WORLD = "synthetic:grounding?size=56x56&distractors=0-2"
SMALL = dict(
    model="tiny", data=(WORLD,), prompts=4, group=3, max_tokens=8, lr=1.0, max_norm=1e9, checkpointing=False,
    steps=3, eval_samples=3, pictures_every=0, overlong="keep", micro_tokens=2000,
)


def by_length(task, completion, answer, image_size=None, *, truncated=False, **options):
    """A reward with variance for a model that knows nothing: hashes the text into [0, 1]."""
    return (sum(map(ord, completion)) % 97) / 97


def make_run(ranks, optimizer="sgd", reward=by_length, **changes):
    config = grpo_vl.Config(**(SMALL | changes))
    run = training.prepare(config, ranks, config.model, freeze_vision=config.freeze_vision, beta=config.beta)
    run.reward = reward
    if optimizer == "sgd":
        run.optimizer = torch.optim.SGD([p for p in run.policy.parameters() if p.requires_grad], lr=config.lr)
    run.sampler.refresh(run.policy)
    return run


def full_weights(policy):
    options = dist_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {n: w.clone() for n, w in dist_state.get_model_state_dict(policy, options=options).items()}


def rollouts(ranks, **changes):
    """{draw: (tokens, logps, rewards)} of the first step's groups, of all ranks."""
    run = make_run(ranks, **changes)
    groups, rewards_of = grpo_vl.collect_groups(run, 0)
    found = {g.draw: ([c.tokens for c in g.completions], [c.logps for c in g.completions]) for g in groups}
    merged = {draw: value for part in ranks.gather(found) for draw, value in part.items()}
    return merged, rewards_of


def steps(ranks, count=3, **changes):
    """(metrics of each step, weights afterwards) of `count` steps from the same seed."""
    run = make_run(ranks, **changes)
    metrics = [grpo_vl.train_step(run, step) for step in range(count)]
    weights = full_weights(run.policy)
    return metrics, weights if ranks.rank == 0 else None


def mixed_modalities(ranks, text_rank):
    """A step in which one rank sees text alone and the other images."""
    run = make_run(ranks, prompts=2)
    text = datasets.open_data(["synthetic:math?text=1"], seed=0)
    plain = run.data

    class Mixed:
        def __getitem__(self, draw):
            return text[draw] if draw % 2 == text_rank else plain[draw]

    run.data = Mixed()
    return grpo_vl.train_step(run, 0)


def one_rank_drops_everything(ranks):
    """Dynamic sampling in which rank 1's groups never have variance: it trains on fillers."""
    run = make_run(ranks, dynamic_sampling=1, prompts=4)

    def reward(task, completion, answer, image_size=None, *, truncated=False, **options):
        return by_length(task, completion, answer) if ranks.rank == 0 else 0.5

    run.reward = reward
    return grpo_vl.train_step(run, 0)


def nothing_to_learn(ranks):
    """All groups equal: every advantage is zero, dynamic sampling finds nothing."""
    run = make_run(ranks, dynamic_sampling=1, reward=lambda *a, **k: 1.0)
    before = full_weights(run.policy)
    metrics = grpo_vl.train_step(run, 0)
    after = full_weights(run.policy)
    return metrics, all(torch.equal(before[name], after[name]) for name in before)


def everything_truncated(ranks, **changes):
    """A step whose completions were all cut at the length limit."""
    run = make_run(ranks, **changes)
    generate = run.sampler.generate

    def cut(*arguments):
        groups = generate(*arguments)
        for completion in [completion for group in groups for completion in group]:
            completion.truncated = True
        return groups

    run.sampler.generate = cut
    return grpo_vl.train_step(run, 0)


def checkpoint_roundtrip(ranks, folder, **changes):
    """Six steps at once, against three, a fresh start from the checkpoint, and three more."""
    results = []
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for stop in stops:
            run = make_run(ranks, optimizer="adamw", lr=1e-3, steps=6, out=f"{folder}/{name}", **changes)
            first, found = 0, run_folder.find_checkpoints(Path(run.config.out))
            if found:
                state = run_folder.load_checkpoint(found[-1], run.policy, run.optimizer)
                first, run.cursor = state["step"], state["cursor"]
                run.sampler.refresh(run.policy)
            for step in range(first, stop):
                grpo_vl.train_step(run, step)
            state = {"step": stop, "cursor": run.cursor}
            run_folder.save_checkpoint(Path(run.config.out), run.policy, run.optimizer, state, keep=1)
        results.append(full_weights(run.policy))
    left = [path.name for path in Path(folder, "parts").iterdir()]
    return all(torch.equal(results[0][n], results[1][n]) for n in results[0]), left


def export(ranks, folder, model):
    """A trained step's weights in Hugging Face format, and the policy's own log-probs to compare with."""
    run = make_run(ranks, model=model, lr=0.1)
    grpo_vl.train_step(run, 0)
    weights = fsdp.full_state_dict(run.policy)
    run_folder.export(Path(folder), run.policy, weights, run.tokenizer, model)
    return json.loads((Path(folder) / "config.json").read_text())["tie_word_embeddings"]


def train_and_save(ranks, folder):
    """Two steps, saved: the full weights and, of each parameter, AdamW's two moments and its step."""
    run = make_run(ranks, optimizer="adamw", lr=1e-3, out=folder)
    for step in range(2):
        grpo_vl.train_step(run, step)
    run_folder.save_checkpoint(Path(folder), run.policy, run.optimizer, {"step": 2, "cursor": run.cursor}, keep=1)
    states = [run.optimizer.state[p] for p in run.policy.parameters()]
    moments = [(s["exp_avg"].full_tensor(), s["exp_avg_sq"].full_tensor(), s["step"]) for s in states]
    return full_weights(run.policy), moments


def gloo_threads(ranks):
    """How many of gloo's worker threads live here, after a step."""
    steps(ranks, count=1)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")
