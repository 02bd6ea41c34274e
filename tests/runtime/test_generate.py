"""The generation loop over a toy model whose logits depend on every token, against loops without cache or
streaming.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import END, ToySession, hashed, scripted, toy_tokenizer

from pyinfer.errors import ContextFullError, InputError
from pyinfer.runtime.generate import CachedSequence, StopStrings, TextOptions, generate_tokens, stream_text
from pyinfer.runtime.sampler import Sampler, SamplingParams, token_logprob

GREEDY = SamplingParams(temperature=0)
PROMPT = list(b"Once upon a time\n")


def greedy_tokens(prompt, count, end_ids=()):
    """The definition: evaluate everything again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        token = int(np.argmax(hashed(tokens)))
        if token in end_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def run(generator):
    """All tokens and the reason for the end."""
    tokens = []
    while True:
        try:
            tokens.append(next(generator))
        except StopIteration as end:
            return tokens, end.value


def generate(cache, prompt, count, params=GREEDY, **options):
    options = {"end_ids": (), **options}
    return run(generate_tokens(cache, prompt, Sampler(params), max_tokens=count, **options))


def stream(rule, options, *, prompt=PROMPT, params=GREEDY, **session):
    cache = CachedSequence(ToySession(rule, **session))
    return list(stream_text(cache, toy_tokenizer(), prompt, Sampler(params), options))


def test_tokens_equal_the_loop_without_a_cache():
    cache = CachedSequence(ToySession())
    assert generate(cache, PROMPT, 30) == (greedy_tokens(PROMPT, 30), "length")
    assert cache.session.computed == len(PROMPT) + 29
    assert cache.tokens == cache.session.held[0] == PROMPT + greedy_tokens(PROMPT, 29)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 6)
)
def test_a_reused_prefix_changes_nothing(prompts, count):
    cache = CachedSequence(ToySession())
    for prompt in prompts:
        assert generate(cache, prompt, count)[0] == greedy_tokens(prompt, count)
        assert cache.tokens == cache.session.held[0]


def test_a_continued_prompt_computes_only_what_is_new():
    cache = CachedSequence(ToySession())
    tokens, _ = generate(cache, PROMPT, 10)
    before = cache.session.computed
    longer = PROMPT + tokens + [1, 2, 3]
    assert generate(cache, longer, 1)[0] == greedy_tokens(longer, 1)
    assert cache.session.computed == before + 4  # the last generated token was not in the cache yet
    assert generate(cache, longer, 1)[0] == greedy_tokens(longer, 1)
    assert cache.session.computed == before + 4  # the logits are still there
    assert generate(cache, longer[:-1], 1)[0] == greedy_tokens(longer[:-1], 1)
    assert cache.session.computed == before + 5  # only logits of the last token are kept


def test_a_session_used_by_somebody_else_is_noticed():
    cache = CachedSequence(ToySession())
    generate(cache, PROMPT, 3)
    cache.session.truncate(0)
    cache.session.prefill([1, 2, 3])
    assert generate(cache, PROMPT, 3)[0] == greedy_tokens(PROMPT, 3)


@pytest.mark.parametrize("length", [11, len(PROMPT) - 1, len(PROMPT)])
def test_interleaved_generations_on_one_sequence(length):
    cache = CachedSequence(ToySession())
    other = list(range(length))
    first = generate_tokens(cache, PROMPT, Sampler(GREEDY), max_tokens=6, end_ids=())
    second = generate_tokens(cache, other, Sampler(GREEDY), max_tokens=6, end_ids=())
    pairs = [(next(first), next(second)) for _ in range(6)]
    assert [a for a, _ in pairs] == greedy_tokens(PROMPT, 6)
    assert [b for _, b in pairs] == greedy_tokens(other, 6)


def test_sequences_of_one_session_are_apart():
    session = ToySession()
    caches = [CachedSequence(session, 0), CachedSequence(session, 3)]
    assert [generate(cache, PROMPT, 5)[0] for cache in caches] == [greedy_tokens(PROMPT, 5)] * 2
    assert len(session.held[3]) == len(PROMPT) + 4


def test_an_end_token_is_not_part_of_the_answer():
    end = greedy_tokens(PROMPT, 8)[-1]
    expected = greedy_tokens(PROMPT, 8, end_ids={end})
    assert generate(CachedSequence(ToySession()), PROMPT, 20, end_ids={end}) == (expected, "stop")


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_full_context_ends_with_length(room):
    cache = CachedSequence(ToySession(n_ctx=len(PROMPT) + room))
    assert generate(cache, PROMPT, None) == (greedy_tokens(PROMPT, room + 1), "length")


def test_a_prompt_longer_than_the_context_says_both_numbers():
    with pytest.raises(ContextFullError, match="17 tokens, the context holds 16"):
        generate(CachedSequence(ToySession(n_ctx=16)), PROMPT, 1)


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([1, 260], "token 260"), ([-1], "0 to 259")])
def test_bad_prompts(prompt, message):
    with pytest.raises(InputError, match=message):
        generate(CachedSequence(ToySession()), prompt, 1)


def test_no_tokens_wanted():
    cache = CachedSequence(ToySession())
    assert generate(cache, PROMPT, 0) == ([], "length")
    assert cache.logits is not None


def test_cancelled_between_tokens():
    taken = []
    cache = CachedSequence(ToySession())
    tokens = generate_tokens(
        cache, PROMPT, Sampler(GREEDY), max_tokens=None, end_ids=(), cancelled=lambda: len(taken) == 4
    )
    with pytest.raises(StopIteration, match="cancelled"):
        while True:
            taken.append(next(tokens))
    assert taken == greedy_tokens(PROMPT, 4)
    assert generate(cache, PROMPT, 6)[0] == greedy_tokens(PROMPT, 6)


def test_cancelled_in_the_prompt_keeps_what_was_done():
    done = []
    cache = CachedSequence(ToySession())
    cancelled = generate(
        cache, PROMPT, 5, cancelled=lambda: len(done) > 1, progress=lambda *p: done.append(p)
    )
    assert cancelled == ([], "cancelled")
    assert done == [(8, 17), (16, 17)]
    assert cache.tokens == PROMPT[:16]
    before = cache.session.computed
    assert generate(cache, PROMPT, 2)[0] == greedy_tokens(PROMPT, 2)
    assert cache.session.computed == before + 2


def test_an_error_in_the_session_does_not_confuse_the_cache():
    class Failing(ToySession):
        fails = True

        def step(self, tokens, sequences):
            logits = super().step(tokens, sequences)
            if self.fails:
                raise KeyboardInterrupt
            return logits

    cache = CachedSequence(Failing())
    with pytest.raises(KeyboardInterrupt):
        generate(cache, PROMPT, 5)
    cache.session.fails = False
    assert generate(cache, PROMPT, 5)[0] == greedy_tokens(PROMPT, 5)


def test_penalties_see_prompt_and_answer():
    params = SamplingParams(temperature=0, presence_penalty=1e6, penalty_last_n=-1)
    tokens, _ = generate(CachedSequence(ToySession(n_ctx=400)), [5, 6, 7], 250, params)
    assert len({5, 6, 7, *tokens}) == 253


def test_append_gives_the_logits_of_every_token():
    cache = CachedSequence(ToySession())
    rows = cache.append(PROMPT[:5], all_logits=True)
    assert np.array_equal(rows, [hashed(PROMPT[: n + 1]) for n in range(5)])
    assert np.array_equal(cache.append(PROMPT[5:9]), [hashed(PROMPT[:9])])
    assert generate(cache, PROMPT, 4)[0] == greedy_tokens(PROMPT, 4)
    assert cache.session.computed == len(PROMPT) + 3


# -- text


def cut_at_stop(text, stops):
    """The definition: read character by character;

    the first stop string that is complete ends the text before it.
    """
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    text = "".join(pieces)
    expected, found = cut_at_stop(text, stops)
    cutter, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += cutter.push(piece)
        assert expected.startswith(shown)  # no part of a stop string, not for a moment
        if cutter.found:
            break
    shown += cutter.finish()
    assert (shown, cutter.found) == (expected, found)


def test_text_is_held_back_no_longer_than_needed():
    cutter = StopStrings(["###"])
    assert [cutter.push(piece) for piece in ("a#", "b", "##", "c")] == ["a", "#b", "", "##c"]


@settings(max_examples=100, deadline=None)
@given(
    answer=st.text("aé漢🙂 .", max_size=12),
    stops=st.lists(st.text("aé漢🙂 .", min_size=1, max_size=3), max_size=2),
)
def test_streamed_text_is_cut_at_stop_strings(answer, stops):
    segments = stream(scripted(answer), TextOptions(None, tuple(stops)))
    expected, _ = cut_at_stop(answer, stops)
    assert "".join(segment.text for segment in segments) == expected
    assert [segment.finish_reason for segment in segments] == [None] * (len(segments) - 1) + ["stop"]
    assert all(segment.text for segment in segments[:-1])
    made = [token for segment in segments for token in segment.tokens]
    assert bytes(made) == answer.encode()[: len(made)]
    assert segments[-1].stats.completion_tokens == len(made)


def test_a_cut_character_is_shown_at_the_end():
    segments = stream(scripted("ab漢".encode()[:-1]), TextOptions())
    assert "".join(segment.text for segment in segments) == "ab\ufffd"


def test_held_text_comes_when_no_stop_string_does():
    segments = stream(scripted("well #"), TextOptions(None, ("##",)))
    assert [segment.text for segment in segments] == ["w", "e", "l", "l", " ", "#"]
    assert segments[-1].tokens == (ord("#"),)


def test_reasons():
    assert stream(scripted("hello"), TextOptions(3))[-1].finish_reason == "length"
    assert stream(scripted("hello"), TextOptions(5))[-1].finish_reason == "length"
    assert stream(scripted("hello"), TextOptions(6))[-1].finish_reason == "stop"
    assert stream(scripted("hello"), TextOptions(), n_ctx=19)[-1].finish_reason == "length"
    only = stream(scripted("hello"), TextOptions(0))
    assert [(s.text, s.tokens, s.finish_reason) for s in only] == [("", (), "length")]
    assert END not in stream(scripted(""), TextOptions())[0].tokens


def test_figures():
    cache = CachedSequence(ToySession(scripted("hello"), step_seconds=0.001))
    *_, last = stream_text(cache, toy_tokenizer(), PROMPT, Sampler(GREEDY), TextOptions())
    stats = last.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.completion_tokens) == (17, 0, 5)
    assert stats.prefill_seconds >= 0.017
    assert stats.decode_seconds >= 0.004
    assert stats.first_token_seconds >= stats.prefill_seconds
    assert stats.prefill_tokens_per_second == pytest.approx(17 / stats.prefill_seconds)
    assert stats.decode_tokens_per_second == pytest.approx(4 / stats.decode_seconds)
    *_, last = stream_text(
        cache, toy_tokenizer(), [*PROMPT, ord("h")], Sampler(GREEDY), TextOptions(1), began=0.0
    )
    assert last.stats.reused_tokens == 17
    assert last.stats.first_token_seconds > last.stats.prefill_seconds


def test_logprobs_are_of_the_models_own_distribution():
    params = SamplingParams(temperature=0, logit_bias={7: 100.0})
    segments = stream(hashed, TextOptions(3, (), 2), params=params)
    entries = [entry for segment in segments for entry in segment.logprobs]
    assert entries == [token_logprob(hashed([*PROMPT, *[7] * n]), 7, 2) for n in range(3)]
    assert [len(segment.logprobs) for segment in segments] == [len(segment.tokens) for segment in segments]
    assert all(not segment.logprobs for segment in stream(hashed, TextOptions(3)))


@pytest.mark.parametrize(
    "options", [{"max_tokens": -1}, {"max_tokens": 1.5}, {"logprobs": -1}, {"stop": ("",)}]
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*expected"):
        TextOptions(**options)
