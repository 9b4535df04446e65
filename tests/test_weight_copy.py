"""The sampler's copy of the weights: where each parameter goes, and what stays fp32."""
from copy import deepcopy

import pytest
import torch

import policy as policy_module
from sampler import Sampler


def test_refresh_takes_every_parameter_once_and_later_a_part(world):
    policy, _, _, special, _ = world
    other = Sampler(policy.model, special)
    pairs = list(policy.named_parameters())
    with pytest.raises(ValueError, match="never got"):
        other.refresh(iter(pairs[1:]))
    other.refresh(iter(pairs))
    assert other.copy.targets.keys() == dict(pairs).keys()
    for name, parameter in pairs:
        assert torch.equal(other.copy.targets[name], parameter)
    other.refresh([(pairs[0][0], 2 * pairs[0][1].detach())])  # later a part may do: a frozen tower stays
    assert torch.equal(other.copy.targets[pairs[0][0]], 2 * pairs[0][1])
    with pytest.raises(ValueError, match="nobody's"):
        other.refresh([("nobody's.weight", torch.zeros(1))])


def test_a_new_copy_draws_no_random_weights(world):
    """Each would be overwritten by the first refresh."""
    policy, _, _, special, _ = world
    before = torch.get_rng_state()
    Sampler(policy.model, special)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bf16_copy_keeps_the_rotary_angles_in_fp32(world):
    """Its buffers are the policy's, and its features those of the policy's tower with weights cast and no buffer."""
    policy, _, _, special, prompts = world
    rounded = Sampler(policy.model, special, dtype=torch.bfloat16)
    rounded.refresh(policy.named_parameters())
    for ours, theirs in ((rounded.copy.vision, policy.vision), (rounded.copy.rotary, policy.decoder.rotary_emb)):
        buffers = dict(theirs.named_buffers())
        assert buffers.keys() == dict(ours.named_buffers()).keys() and buffers
        for name, buffer in ours.named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, buffers[name]), name
    tower = deepcopy(policy.vision)
    tower.load_state_dict({name: weight.bfloat16() for name, weight in tower.state_dict().items()}, assign=True)
    policy_module.replace_vision_forwards(tower)  # a copy's forwards are bound to the original
    seeing = [prompt for prompt in prompts if prompt.grids]
    pixels_ND = torch.cat([prompt.pixels_ND for prompt in seeing]).bfloat16()
    grids = torch.tensor([grid for prompt in seeing for grid in prompt.grids])
    with torch.no_grad():
        want = policy_module.vision_features(tower, pixels_ND, grids)
        assert torch.equal(rounded.image_features(seeing), want)
