"""Stand-ins for the parts below the runtime: an executor whose logits are a hash of what its cache holds, and tokenizers.

The executor notices every mistake in the bookkeeping of slots: it refuses a position that was not computed, and a
wrong token anywhere in a slot changes all logits after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from edgellm_ros.executors.base import Executor, ExecutorInfo, LoadedAdapter, SequenceStep
from edgellm_ros.tokenizer import Tokenizer

BYTE_VOCAB = 260  # 256 bytes, <eos>, <user>, <assistant>, <system>
EOS = 256
ADAPTED = 1 << 20  # times the adapter's index: added to the tokens in the cache, so that adapters are told apart


def fake_logits(token_ids: Sequence[int], vocab: int) -> npt.NDArray[np.float32]:
    """The logits after `token_ids`, a function of all of them."""
    state = 1469598103934665603
    for token in token_ids:
        state = ((state ^ (int(token) + 1)) * 1099511628211) % 2**64
    return np.random.default_rng(state).standard_normal(vocab).astype(np.float32)


def reference_greedy(
    prompt: Sequence[int], count: int, vocab: int, allowed: int | None = None, adapter: int = 0
) -> list[int]:
    """What greedy decoding gives without any cache; `allowed` limits it to the first ids."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(fake_logits([i + ADAPTED * adapter for i in ids], vocab)[:allowed].argmax()))
    return ids[len(prompt) :]


class FakeExecutor(Executor):
    """See the module. `allowed` keeps ids from there on improbable; `before_step` runs in every step, and may raise."""

    def __init__(
        self,
        num_slots: int = 4,
        capacity: int = 256,
        vocab: int = BYTE_VOCAB,
        allowed: int | None = None,
        before_step: Callable[[Sequence[SequenceStep]], None] | None = None,
        adapters: Mapping[str, LoadedAdapter] | None = None,
    ) -> None:
        self.info = ExecutorInfo("fake", "none", "exact", num_slots, capacity, vocab, 4, 0)
        self.calls: list[list[SequenceStep]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.loads: list[tuple[int, int]] = []
        self.saves: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.closed = 0
        self.before_step = before_step
        self._adapters = dict(adapters or {})
        self._contents = {a.index: a.index for a in self._adapters.values()} | {0: 0}
        self.before_load: Callable[[str], None] | None = None
        self._cache = np.full((num_slots, capacity), -1, np.int32)
        self._allowed = allowed
        self._valid = [0] * num_slots

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        return self._adapters

    def load_adapter(self, name: str, source: Any) -> LoadedAdapter:
        """`source` is the whole number that tells the adapter apart in the cache; the lowest free place is taken."""
        self.threads.add(threading.get_ident())
        if self.before_load is not None:
            self.before_load(name)
        index = next(i for i in range(1, 99) if i not in self._contents)
        self._contents[index] = source
        self._adapters[name] = LoadedAdapter(index, f"contents {source}")
        return self._adapters[name]

    def unload_adapter(self, name: str) -> None:
        self.threads.add(threading.get_ident())
        del self._contents[self._adapters.pop(name).index]

    def step(self, batch: Sequence[SequenceStep]) -> npt.NDArray[np.float32]:
        self.threads.add(threading.get_ident())
        assert not self.closed
        assert len({s.slot for s in batch}) == len(batch) > 0
        self.calls.append(list(batch))
        if self.before_step is not None:
            self.before_step(batch)
        rows = []
        for s in batch:
            end = s.position + len(s.token_ids)
            assert len(s.token_ids) > 0 and end <= self.info.capacity, "a step outside the slot"
            assert s.position <= self._valid[s.slot], "a step after tokens that were not computed"
            self._cache[s.slot, s.position : end] = s.token_ids + ADAPTED * self._contents[s.adapter]
            self._valid[s.slot] = end
            for last in range(end - s.num_logits + 1, end + 1):
                row = fake_logits(self._cache[s.slot, :last].tolist(), self.info.vocab_size)
                if self._allowed is not None:
                    row[self._allowed :] -= 100.0
                rows.append(row)
        return np.array(rows, np.float32).reshape(-1, self.info.vocab_size)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.threads.add(threading.get_ident())
        assert source != target and length <= self._valid[source]
        self.copies.append((source, target, length))
        self._cache[target, :length] = self._cache[source, :length]
        self._valid[target] = length

    def save_prefix(self, slot: int, length: int) -> npt.NDArray[np.uint8]:
        self.threads.add(threading.get_ident())
        assert length <= self._valid[slot]
        self.saves.append((slot, length))
        return self._cache[slot, :length].copy().view(np.uint8)

    def load_prefix(self, slot: int, data: npt.NDArray[np.uint8], length: int) -> None:
        self.threads.add(threading.get_ident())
        assert data.nbytes == length * 4
        self.loads.append((slot, length))
        self._cache[slot, :length] = data.view(np.int32)
        self._valid[slot] = length

    def close(self) -> None:
        self.closed += 1

    @property
    def computed_tokens(self) -> int:
        """Tokens of all steps so far."""
        return sum(len(s.token_ids) for call in self.calls for s in call)


def byte_tokenizer_json(merges: Sequence[tuple[str, str]] = ()) -> str:
    """A byte-level BPE whose id is the byte, then the special tokens, then `merges`."""
    alphabet = _alphabet()
    vocab = {char: byte for byte, char in enumerate(alphabet)}
    specials = ["<eos>", "<user>", "<assistant>", "<system>"]
    for i, token in enumerate(specials):
        vocab[token] = 256 + i
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    text: str = inner.to_str()
    return text


def byte_tokenizer() -> Tokenizer:
    """As a Tokenizer."""
    return Tokenizer(byte_tokenizer_json())


def sentencepiece_tokenizer_json() -> str:
    """As Llama 2's: metaspace by a normalizer, byte fallback, one leading space stripped by the decoder."""
    from tokenizers import normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    letters = ["\u2581", *"abcdehlnorstuw", "\u00e9"]
    merges = [("\u2581", "h"), ("h", "e"), ("l", "o"), ("\u2581", "w"), ("\u2581", "\u2581"), ("o", "r")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, *(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    text: str = inner.to_str()
    return text


def _alphabet() -> list[str]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {byte: chr(byte) for byte in plain}
    for i, byte in enumerate(b for b in range(256) if b not in chars):
        chars[byte] = chr(256 + i)
    return [chars[byte] for byte in range(256)]
