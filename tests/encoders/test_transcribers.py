"""The decoder of transcripts, the tokens' mean, and the states of sounds."""

from __future__ import annotations

import pytest
import torch

from counterpoint.encoders.audio import FramesS, build_audio_encoder
from counterpoint.encoders.transcribers import SequenceDecoder, TokenMean
from counterpoint.errors import CounterpointError


def decoder() -> SequenceDecoder:
    torch.manual_seed(0)
    return SequenceDecoder(11, 6, 5, 8, 1, 2).eval()


def test_a_token_depends_on_earlier_tokens_and_on_states_that_are_there():
    network, states = decoder(), torch.randn(2, 4, 6)
    there = torch.tensor([[True] * 4, [True, True, False, False]])
    tokens = torch.randint(11, (2, 5))
    found = network(tokens, states, there)
    other = tokens.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 11
    torch.testing.assert_close(network(other, states, there)[:, :3], found[:, :3])
    assert not torch.allclose(network(other, states, there)[:, 3:], found[:, 3:])
    changed = states.clone()
    changed[1, 2:] += 1
    torch.testing.assert_close(network(tokens, changed, there), found)
    changed[1, 0] += 1
    assert not torch.allclose(network(tokens, changed, there)[1], found[1])


def test_greedy_writes_the_best_next_token_until_the_end():
    network, states, there = decoder(), 3 * torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    for end in range(11):
        found = network.greedy(states, there, 0, end)
        assert found.shape == (3, 5)
        for row, tokens in enumerate(found.tolist()):
            before = [0]
            for token in tokens:
                if end in before[1:]:
                    assert token == end
                    continue
                best = network(torch.tensor([before]), states[row : row + 1], there[:1])[0, -1].argmax()
                assert token == int(best)
                before.append(token)


def test_the_mean_of_tokens_leaves_padding_out():
    network = TokenMean(7, 3)
    ids, mask = torch.tensor([[1, 2, 5], [3, 3, 3]]), torch.tensor([[True, True, False], [False, False, False]])
    wanted = torch.stack([network.embed.weight[[1, 2]].mean(0), torch.zeros(3)])
    torch.testing.assert_close(network(ids, mask), wanted)


def test_states_of_a_sound_end_with_it_and_silence_has_one():
    torch.manual_seed(0)
    network = build_audio_encoder("frames-s", 8000, 8000)
    assert isinstance(network, FramesS)
    wave = torch.randn(3, 8000)
    wave[1, 3000:] = 0
    wave[2] = 0
    states, there = network.states(wave)
    assert states.shape == (*there.shape, network.dim)
    count = there.sum(1)
    assert count[0] == there.shape[1] > count[1] > count[2] == 1
    assert count[1] / there.shape[1] == pytest.approx(3000 / 8000, abs=0.08)
    torch.testing.assert_close(network(wave)[1], states[1][there[1]].mean(0))
    assert network(wave).isfinite().all()


def test_an_unknown_encoder_of_sounds_is_named():
    with pytest.raises(CounterpointError, match="frames-m"):
        build_audio_encoder("frames-m", 8000, 8000)
