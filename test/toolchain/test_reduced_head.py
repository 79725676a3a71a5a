"""A bundle with a reduced head answers as the whole model does when every other token is masked out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from test_export import PROMPT, hf_logits, run_executor, run_portable
from tiny import VOCAB_SIZE, make_model
from transformers.generation import logits_process as hf

from edgellm_ros.bundle import DECODER, VOCAB_MAP, Bundle, hash_file
from edgellm_ros.config import EngineConfig
from edgellm_ros.core import Completion, Request, SamplingParams
from edgellm_ros.errors import BundleError, RequestError, ToolchainError
from edgellm_ros.executors.onnxruntime import OnnxRuntimeExecutor
from edgellm_ros.llm import LLM
from edgellm_ros.manifest import MANIFEST
from edgellm_ros.runtime.sampling import uniform
from edgellm_ros.toolchain.checkpoint import open_checkpoint
from edgellm_ros.toolchain.export import export_bundle
from edgellm_ros.toolchain.required_tokens import required_tokens


def kept_tokens(checkpoint: Path) -> list[int]:
    """What must stay, and every sixth of the rest."""
    source = open_checkpoint(checkpoint)
    found = required_tokens(source.tokenizer_json(), source.token_spec(), source.chat_template(), VOCAB_SIZE)
    kept = set().union(*found.values())
    return sorted(kept | set([i for i in range(VOCAB_SIZE) if i not in kept][::6]))


@pytest.fixture(scope="module")
def cut_bundle(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    made: dict[tuple[str, str], Bundle] = {}

    def get(kind: str, weights: str = "fp32") -> Bundle:
        if (kind, weights) not in made:
            root = tmp_path_factory.mktemp("cut")
            (root / "map.json").write_text(json.dumps({"token_ids": kept_tokens(tiny_checkpoint(kind))}))
            made[kind, weights] = export_bundle(
                tiny_checkpoint(kind), root / "bundle", weights=weights, vocab_map=root / "map.json"
            )
        return made[kind, weights]

    return get


def ids_of(bundle: Bundle) -> np.ndarray:
    return safetensors.numpy.load_file(bundle.path / VOCAB_MAP)["vocab_map"]


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_logits_of_kept_tokens_are_those_of_the_whole_head(
    kind: str, weights: str, cut_bundle: Callable[..., Bundle], tiny_bundle: Callable[..., Bundle]
) -> None:
    cut, whole = cut_bundle(kind, weights), tiny_bundle(kind, weights)
    ids = ids_of(cut)
    assert ids.dtype == np.int32 and 200 < len(ids) < VOCAB_SIZE - 10
    onnx.checker.check_model(str(cut.path / DECODER), full_check=True)
    stem = "embed" if kind == "llama_tied" else "head"
    stored, expected = cut.weights(), whole.weights()
    for part in ("weight", "scale") if weights.startswith("int") else ("weight",):
        assert np.array_equal(stored[f"head.{part}"], expected[f"{stem}.{part}"][ids])
        assert np.array_equal(stored[f"embed.{part}"], expected[f"embed.{part}"]), "the embedding stays whole"
    logits, of_whole = run_executor(cut, PROMPT)[0], run_executor(whole, PROMPT)[0][:, ids]
    # MatMulNBits adds the groups of a last, incomplete block of rows in another order.
    assert np.abs(logits - of_whole).max() <= (1e-5 if weights.startswith("int") else 0)
    portable, reference = run_portable(cut, PROMPT), run_portable(whole, PROMPT)[:, ids]
    assert np.abs(portable - reference).max() <= (0 if weights == "fp32" else 0.02)
    if weights == "fp32":
        assert np.abs(portable - hf_logits(make_model(kind), PROMPT)[:, ids]).max() < 1e-3


def expected_step(
    model: torch.nn.Module, ids: list[int], num_prompt: int, kept: np.ndarray, params: SamplingParams
) -> tuple[np.ndarray, np.ndarray]:
    """By transformers, all but `kept` masked out: the probabilities to draw from, and the model's log-probabilities."""
    scores = torch.from_numpy(hf_logits(model, np.array(ids))[-1:].copy())
    tokens = torch.tensor([ids])
    mask = hf.SuppressTokensLogitsProcessor(sorted(set(range(VOCAB_SIZE)) - set(kept.tolist())), device="cpu")
    logprobs = torch.log_softmax(mask(tokens, scores).double(), -1)[0].numpy()
    if params.logit_bias:
        bias = [[[token], float(value)] for token, value in params.logit_bias.items()]
        scores = hf.SequenceBiasLogitsProcessor(bias)(tokens, scores)
    if params.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(tokens, scores)
    for token in ids[num_prompt:]:  # OpenAI's definition; transformers has none
        scores[0, token] -= params.frequency_penalty
    for token in set(ids[num_prompt:]):
        scores[0, token] -= params.presence_penalty
    scores = mask(tokens, scores)
    if params.temperature == 0.0:
        probabilities = np.zeros(VOCAB_SIZE)
        probabilities[int(scores.argmax())] = 1.0
        return probabilities, logprobs
    scores = hf.TemperatureLogitsWarper(params.temperature)(tokens, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(tokens, scores)
    if params.top_p < 1.0:
        scores = hf.TopPLogitsWarper(params.top_p)(tokens, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(tokens, scores)
    return torch.softmax(scores.double(), -1)[0].numpy(), logprobs


def complete(bundle: Bundle, sampling: SamplingParams, prompt: np.ndarray = PROMPT) -> Completion:
    with LLM.open(bundle, EngineConfig(executor="onnxruntime", max_slots=1, max_context=256)) as llm:
        return llm.complete(Request(prompt_ids=tuple(prompt.tolist()), sampling=sampling))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 1.3},
        {"temperature": 0.9, "top_k": 12, "repetition_penalty": 1.2},
        {"temperature": 1.1, "top_p": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.2},
        {"temperature": 1.5, "min_p": 0.05, "logit_bias": "some"},
        {"temperature": 0.0, "logit_bias": "some"},
    ],
)
def test_an_answer_is_the_masked_models(fields: dict, cut_bundle: Callable[..., Bundle]) -> None:
    bundle = cut_bundle("llama_tied")
    kept = ids_of(bundle)
    dropped = np.setdiff1d(np.arange(VOCAB_SIZE), kept)
    if "logit_bias" in fields:
        fields = {**fields, "logit_bias": {int(kept[150]): 6.0, int(kept[-9]): -3.0, int(dropped[2]): -5.0}}
    params = SamplingParams(max_tokens=40, seed=77, ignore_eos=True, logprobs=3, **fields)
    prompt = np.concatenate([PROMPT[:40], dropped[:4]]).astype(np.int32)  # a prompt may have every token
    answer = complete(bundle, params, prompt)
    assert len(answer.token_ids) == 40
    model, ids, whole_model_differs = make_model("llama_tied"), prompt.tolist(), False
    for index, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        probabilities, logprobs = expected_step(model, ids, len(prompt), kept, params)
        mass = np.cumsum(probabilities)
        share = uniform(77, index) * mass[-1]
        assert token == int(np.searchsorted(mass, share, side="right")), (index, fields)
        best = np.argsort(-logprobs, kind="stable")[:3]
        assert entry.token_id == token and entry.logprob == pytest.approx(logprobs[token], abs=1e-4)
        assert [t for t, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(logprobs[best].tolist(), abs=1e-4)
        whole_model_differs |= int(hf_logits(model, np.array(ids))[-1].argmax()) in dropped
        ids.append(token)
    assert whole_model_differs, "the mask must have mattered"


def test_a_bias_for_a_dropped_token_is_refused_by_name_and_one_against_it_is_idle(
    cut_bundle: Callable[..., Bundle],
) -> None:
    bundle = cut_bundle("llama")
    token = int(np.setdiff1d(np.arange(VOCAB_SIZE - 5), ids_of(bundle))[0])
    plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with pytest.raises(
        RequestError, match=rf"logit_bias favours token {token} .* cannot give.*cut to .* of {VOCAB_SIZE}"
    ):
        complete(bundle, replace(plain, logit_bias={token: 0.5}))
    assert complete(bundle, replace(plain, logit_bias={token: -50.0})).token_ids == complete(bundle, plain).token_ids


def test_a_map_that_does_not_fit_is_refused_and_leaves_nothing(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, path = tiny_checkpoint("llama"), tmp_path / "map.json"
    kept = kept_tokens(source)
    for content, message in (
        ({"token_ids": kept, "vocab_size": 999}, "for a vocabulary of 999 tokens, the model has 320"),
        ({"token_ids": kept, "tokenizer_sha256": "ab"}, "another tokenizer.json"),
        ({"token_ids": [i for i in kept if i not in (2, 50)]}, r"lacks 2 tokens that must stay .*: 2, 50; .*--tokens"),
        ({"token_ids": kept[::-1]}, "outside|token ids .* to|must ascend"),
        ({"token_ids": [*kept, kept[-1]]}, f"must ascend, and {kept[-1]} follows {kept[-1]}"),
        ({"token_ids": [*kept, 320]}, "token ids 0 to 320; the model's are 0 to 319"),
        ({"token_ids": list(range(320))}, "keeps all 320 tokens, so it cuts nothing"),
        ({"token_ids": [1.5]}, "1.5 where a whole number"),
        ([1], "no vocabulary map: it has no list token_ids"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ToolchainError, match=message):
            export_bundle(source, tmp_path / "out", vocab_map=path)
    with pytest.raises(ToolchainError, match=r"must end in \.json or \.safetensors"):
        export_bundle(source, tmp_path / "out", vocab_map=tmp_path / "map.txt")
    with pytest.raises(ToolchainError, match="no vocabulary map"):
        export_bundle(source, tmp_path / "out", vocab_map=tmp_path / "none.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["map.json"]


def test_a_map_as_tensorrt_edge_llm_writes_it_is_taken(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    kept = np.array(kept_tokens(tiny_checkpoint("llama")), np.int32)
    safetensors.numpy.save_file({"vocab_map": kept}, tmp_path / "map.safetensors")
    bundle = export_bundle(
        tiny_checkpoint("llama"), tmp_path / "out", weights="fp16", vocab_map=tmp_path / "map.safetensors"
    )
    assert bundle.manifest.model.head_rows == len(kept) and ids_of(bundle).tolist() == kept.tolist()
    assert set(bundle.manifest.self_test.cases[0].next_ids) <= set(kept.tolist())


def test_a_bundle_whose_map_and_head_disagree_is_not_loaded(cut_bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    good = cut_bundle("llama")
    kept = ids_of(good)
    stop = good.manifest.tokens.stop_ids[0]
    for ids, message in (
        (kept[:-1], f"has {len(kept) - 1} tokens, the head {len(kept)} rows"),
        (
            np.sort([*kept[kept != stop], np.setdiff1d(np.arange(VOCAB_SIZE), kept)[0]]),
            rf"without a row are \[{stop}\]",
        ),
        (kept[::-1].copy(), "ascend|token ids"),
    ):
        root = tmp_path / "bundle"
        shutil.copytree(good.path, root)
        safetensors.numpy.save_file({"vocab_map": np.asarray(ids, np.int32)}, root / VOCAB_MAP)
        manifest = good.manifest
        manifest = replace(manifest, files={**manifest.files, VOCAB_MAP: hash_file(root / VOCAB_MAP)})
        (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            OnnxRuntimeExecutor(Bundle.open(root), EngineConfig())
        shutil.rmtree(root)


def test_the_cuda_executor_takes_a_reduced_head_and_plans_its_rows_alone(cut_bundle: Callable[..., Bundle]) -> None:
    from edgellm_ros.executors.cuda_formats import native_formats

    bundle = cut_bundle("llama")
    weights, model = bundle.weights(), bundle.manifest.model
    assert native_formats(model, bundle.manifest.quantization)["head"].format == "bf16"
    assert weights["head.weight"].shape == (model.head_rows, model.hidden_size)
