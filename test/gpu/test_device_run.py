"""A run on the device draws what the host draws from a step's logits, for everything that a request can ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from draws import agrees
from test_executor_contract import prompt, step

from edgellm_ros import native
from edgellm_ros.bundle import Bundle
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Request, SamplingParams, TokenLogprob
from edgellm_ros.executors import RunSequence
from edgellm_ros.executors.cuda import CudaExecutor
from edgellm_ros.runtime.sampling import Sampler

OpenCuda = Callable[..., CudaExecutor]
VOCAB = 320
LENGTHS = (3, 40, 17, 64, 9, 30, 2, 50)
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.3, "min_p": 0.0},
    "top_k": {"temperature": 1.0, "top_k": 7, "min_p": 0.0},
    "top_p": {"temperature": 1.0, "top_p": 0.7, "min_p": 0.0},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "all of those": {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"temperature": 0.8, "repetition_penalty": 1.6},
    "presence and frequency": {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.7},
    "bias": {"temperature": 1.0, "logit_bias": {7: 4.0, 100: -5.0, 319: 3.5}},
    "logprobs": {"temperature": 1.0, "logprobs": 20},
    "everything": {
        "temperature": 1.2, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.2, "logit_bias": {5: 2.0, 6: -2.0}, "logprobs": 3,
    },
}  # fmt: skip


class Member:
    """A sequence of a run, and the host's sampler beside it."""

    def __init__(self, slot: int, ids: np.ndarray, params: SamplingParams, first: int = 9) -> None:
        self.slot, self.ids, self.params = slot, ids, params
        self.answer = [first]
        self.logprobs: list[TokenLogprob | None] = []

    @property
    def position(self) -> int:
        """Of the last token."""
        return len(self.ids) + len(self.answer) - 1

    def for_run(self, masked: bool = False) -> RunSequence:
        assert self.params.seed is not None
        return RunSequence(self.slot, self.position, self.answer, self.ids, self.params, self.params.seed, masked)

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        self.answer.append(token)
        self.logprobs.append(logprob)

    def check(self, executor: CudaExecutor, masks: Sequence[np.ndarray] | None = None) -> None:
        """Compute the answer again, step by step: every token lies where the host's draw falls."""
        sampler: Any = Sampler(self.params, VOCAB, self.ids.tolist())
        sampler._index = 1
        for i, token in enumerate(self.answer[1:]):
            if sampler._seen is not None:
                sampler._seen.add(self.answer[i])
            fed = np.array([self.answer[i]], np.int32)
            logits = executor.step([step(self.slot, fed, len(self.ids) + i)])[0].copy()
            mask = None if masks is None else masks[i]
            assert agrees(sampler, sampler._index, logits, token, mask), (self.params, i, token)
            sampler._index += 1
            wanted = self.params.logprobs
            found = self.logprobs[i]
            assert (found is None) == (wanted is None)
            if found is not None:
                self._check_logprob(found, token, logits)

    def _check_logprob(self, found: TokenLogprob, token: int, logits: np.ndarray) -> None:
        wide = logits.astype(np.float64)
        log_softmax = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        order = np.argsort(-logits, kind="stable")[: self.params.logprobs]
        assert found.token_id == token and abs(found.logprob - log_softmax[token]) < 1e-4
        assert [token_id for token_id, _ in found.top] == order.tolist()
        assert np.allclose([value for _, value in found.top], log_softmax[order], atol=1e-4)


def decode(executor: CudaExecutor, members: Sequence[Member], count: int) -> None:
    """`count` tokens of each, the host one step behind."""
    run = executor.run
    assert run is not None
    for i in range(count + 1):
        if i < count:
            run.launch()
        if i > 0:
            result = run.read()
            for member, token, logprob in zip(members, result.token_ids, result.logprobs, strict=True):
                member.take(token, logprob)


def members_of(executor: CudaExecutor, params: Sequence[SamplingParams]) -> list[Member]:
    members = []
    for slot, one in enumerate(params):
        ids = prompt(LENGTHS[slot])
        executor.step([step(slot, ids, 0)])
        members.append(Member(slot, ids, one, 5 + slot))
    return members


def begin(executor: CudaExecutor, members: Sequence[Member], masked: bool = False) -> None:
    assert executor.run is not None
    executor.run.start([member.for_run(masked) for member in members])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_every_token_is_where_the_hosts_draw_falls(feature: str, batch: int, open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16", max_slots=8)
    members = members_of(executor, [SamplingParams(seed=100 + i, **FEATURES[feature]) for i in range(batch)])
    begin(executor, members)
    decode(executor, members, 24)
    for member in members:
        member.check(executor)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("gpu_llama", "fp16"), ("gpu_llama", "int8"), ("gpu_llama", "int4"), ("gpu_gemma3", "fp16"), ("gpu_gemma3", "int4")],
)
def test_mixed_requests_in_one_run_get_the_tokens_that_each_gets_alone(
    kind: str, weights: str, open_cuda: OpenCuda
) -> None:
    executor = open_cuda(kind, weights, max_slots=8)
    names = list(FEATURES)
    for chosen in (names[:8], names[4:12]):
        params = [SamplingParams(seed=7 + i, **FEATURES[name]) for i, name in enumerate(chosen)]
        members = members_of(executor, params)
        begin(executor, members)
        decode(executor, members, 20)
        for member in members:
            alone = Member(member.slot, member.ids, member.params, member.answer[0])
            begin(executor, [alone])
            decode(executor, [alone], 20)
            assert alone.answer == member.answer, member.params
            assert alone.logprobs == member.logprobs
        members[-1].check(executor)


def test_sequences_join_and_leave_between_two_runs(open_cuda: OpenCuda) -> None:
    """Each run begins where the one before ended: draws, penalties and all go on as if it had been one."""
    executor = open_cuda("gpu_qwen3", "fp16", max_slots=8)
    names = ["everything", "greedy", "repetition", "presence and frequency", "top_p", "bias"]
    members = members_of(executor, [SamplingParams(seed=50 + i, **FEATURES[name]) for i, name in enumerate(names)])
    for present, count in (([0], 3), ([0, 2], 5), ([3, 2, 0], 1), ([0, 1, 2, 3, 4, 5], 7), ([5, 1], 4), ([2], 6)):
        group = [members[i] for i in present]
        begin(executor, group)
        decode(executor, group, count)
    assert [len(member.answer) for member in members] == [17, 12, 20, 9, 8, 12]
    for member in members:
        member.check(executor)


def test_a_run_can_be_a_step_too_long_and_the_next_one_is_right(open_cuda: OpenCuda) -> None:
    """A sequence that has ended has one more token computed: what follows in its slot overwrites it."""
    executor = open_cuda("gpu_qwen3", "fp16", max_slots=2)
    params = SamplingParams(seed=3, **FEATURES["all of those"])
    whole = members_of(executor, [params])[0]
    begin(executor, [whole])
    decode(executor, [whole], 12)
    cut = Member(0, whole.ids, params, whole.answer[0])
    begin(executor, [cut])
    assert executor.run is not None
    for _ in range(6):
        executor.run.launch()
    for _ in range(4):
        result = executor.run.read()
        cut.take(result.token_ids[0], result.logprobs[0])
    begin(executor, [cut])  # two steps were launched and never read
    decode(executor, [cut], 8)
    assert cut.answer == whole.answer


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_mask_set_before_a_launch_holds_for_its_token(temperature: float, open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16")
    rng = np.random.default_rng(2)
    params = [
        SamplingParams(seed=4, temperature=temperature, min_p=0.0),
        SamplingParams(seed=5, temperature=1.0, top_k=3),
        SamplingParams(seed=6, temperature=0.7, repetition_penalty=1.5),
    ]
    members = members_of(executor, params)
    masked = members[:2]
    assert executor.run is not None
    executor.run.start([*(m.for_run(masked=True) for m in masked), members[2].for_run()])
    masks: list[list[np.ndarray]] = [[], []]
    for i in range(16):
        for index in range(2):
            mask = rng.random(VOCAB) < 0.05
            mask[rng.integers(VOCAB)] = True
            if i > 0:  # until the first call everything is allowed
                executor.run.set_mask(index, mask)
            masks[index].append(mask if i > 0 else np.ones(VOCAB, np.bool_))
        executor.run.launch()
        result = executor.run.read()
        for member, token, logprob in zip(members, result.token_ids, result.logprobs, strict=True):
            member.take(token, logprob)
        assert all(masks[index][i][masked[index].answer[-1]] for index in range(2))
    for index in range(2):
        masked[index].check(executor, masks[index])
    members[2].check(executor)


@pytest.mark.parametrize("feature", ["greedy", "all of those", "everything"])
def test_a_replayed_run_gives_what_plain_launches_give(feature: str, open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_llama", "int4")
    members = members_of(executor, [SamplingParams(seed=20 + i, **FEATURES[feature]) for i in range(3)])
    begin(executor, members)
    decode(executor, members, 12)
    again = [Member(m.slot, m.ids, m.params, m.answer[0]) for m in members]
    executor._decoder.use_graphs(False)
    begin(executor, again)
    decode(executor, again, 12)
    for one, other in zip(members, again, strict=True):
        assert one.answer == other.answer and one.logprobs == other.logprobs


def test_a_mask_is_refused_where_it_could_not_hold(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16")
    members = members_of(executor, [SamplingParams(seed=1), SamplingParams(seed=2)])
    run = executor.run
    assert run is not None
    run.start([members[0].for_run(masked=True), members[1].for_run()])
    mask = np.ones(VOCAB, np.bool_)
    with pytest.raises(ValueError, match="sequence 1 .* not started with a mask"):
        run.set_mask(1, mask)
    with pytest.raises(ValueError, match="sequence 2 "):
        run.set_mask(2, mask)
    run.launch()
    with pytest.raises(RuntimeError, match="depends on the token before"):
        run.set_mask(0, mask)
    run.read()
    run.set_mask(0, mask)


def test_a_step_outside_the_run_ends_it(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16")
    members = members_of(executor, [SamplingParams(seed=1, temperature=0.0)])
    run = executor.run
    assert run is not None
    begin(executor, members)
    run.launch()
    executor.step([step(1, prompt(5), 0)])
    assert len(run.read().token_ids) == 1
    with pytest.raises(ValueError, match="a step outside the run has ended it"):
        run.launch()


def test_a_run_stops_at_the_end_of_its_fullest_slot(open_cuda: OpenCuda) -> None:
    executor = open_cuda("gpu_qwen3", "fp16", max_context=72)
    members = members_of(executor, [SamplingParams(seed=1), SamplingParams(seed=2)])
    member = Member(0, prompt(64), SamplingParams(seed=1, temperature=0.0))
    executor.step([step(0, member.ids, 0)])
    begin(executor, [member, members[1]])
    decode(executor, [member, members[1]], 8)
    assert executor.run is not None
    with pytest.raises(ValueError, match="a slot of the run is full"):
        executor.run.launch()
    member.check(executor)


def test_what_a_run_cannot_draw_is_said(open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "fp16")
    run = executor.run
    assert run is not None
    many = {i: 0.5 for i in range(module.MAX_BIAS + 1)}
    assert run.can_sample(SamplingParams(logprobs=20, logit_bias={i: 0.5 for i in range(300)}))
    assert not run.can_sample(SamplingParams(logit_bias=many))
    member = Member(0, prompt(5), SamplingParams(seed=1, logit_bias={VOCAB: 1.0}))
    with pytest.raises(ValueError, match="logit_bias has token 320; the head's rows are 0 to 319"):
        begin(executor, [member])
    member = Member(0, np.array([1, VOCAB], np.int32), SamplingParams(seed=1, presence_penalty=1.0))
    with pytest.raises(ValueError, match="the prompt has token 320; the head's rows are 0 to 319"):
        begin(executor, [member])
    with pytest.raises(ValueError, match="1 to 8 sequences, not 9"):
        begin(executor, [Member(0, prompt(5), SamplingParams(seed=1))] * 9)


@pytest.mark.alone
def test_runs_of_every_kind_take_no_memory(open_cuda: OpenCuda) -> None:
    module = native.load()
    executor = open_cuda("gpu_qwen3", "int4", max_slots=8)

    def generate() -> None:
        for name, feature in FEATURES.items():
            members = members_of(executor, [SamplingParams(seed=i, **feature) for i in range(8)])
            for batch in (8, 3, 1):
                begin(executor, members[:batch], masked=name == "everything")
                decode(executor, members[:batch], 6)

    generate()  # CUDA loads a kernel's code when it first runs
    before, free = module.allocation_count(), module.device_info()["free_bytes"]
    generate()
    assert module.allocation_count() == before
    assert module.device_info()["free_bytes"] == free


REQUESTS = [
    Request(
        prompt=f"The robot number {i} says", sampling=SamplingParams(max_tokens=30, seed=i, ignore_eos=True, **more)
    )
    for i, more in enumerate(FEATURES.values())
]


def test_the_engine_gives_each_request_the_tokens_that_it_gets_alone(gpu_bundle: Callable[..., Bundle]) -> None:
    from edgellm_ros.llm import LLM

    with LLM.open(gpu_bundle("gpu_qwen3", "int4"), EngineConfig(executor="cuda", max_slots=8)) as llm:
        alone = [llm.complete(request) for request in REQUESTS]
        running = [llm.submit(request) for request in REQUESTS]
        for one, generation in zip(alone, running, strict=True):
            result = generation.result(60.0)
            assert (result.token_ids, result.text, result.logprobs) == (one.token_ids, one.text, one.logprobs)
            assert len(result.token_ids) == 30


def test_the_engine_on_device_and_on_host_agree_where_greedy(
    gpu_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_ros.executors.cuda_run import CudaRun
    from edgellm_ros.llm import LLM

    greedy = [request for request in REQUESTS if request.sampling.temperature == 0.0]
    assert len(greedy) == 2
    with LLM.open(gpu_bundle("gpu_qwen3", "fp16"), EngineConfig(executor="cuda", max_slots=2)) as llm:
        on_device = [llm.complete(request).token_ids for request in greedy]
        monkeypatch.setattr(CudaRun, "can_sample", lambda self, params: False)
        assert [llm.complete(request).token_ids for request in greedy] == on_device
