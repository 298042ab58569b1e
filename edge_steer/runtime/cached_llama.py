"""CachedLlama: a llama_cpp.Llama whose cached tokens each bear what acted on them. cache.py has the rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_steer.errors import SteerError
from edge_steer.model_file import ModelFile
from edge_steer.runtime.cache import Actions, CacheStamps
from edge_steer.runtime.dials import Dials
from edge_steer.runtime.engines import Engine, EngineName, HookEngine, LoraEngine, choose_engine
from edge_steer.runtime.hooked_llama import HookedLlama
from edge_steer.runtime.reading import TokenReadings
from edge_steer.runtime.rpc import check_servers
from edge_steer.runtime.together import TokenTree
from edge_steer.sites import Architecture
from edge_steer.steering import Steering


class Cancelled(Exception):
    """An evaluation that `CachedLlama.cancelled` ended between two batches; what was evaluated stays cached."""


class CachedLlama(HookedLlama):
    """A llama_cpp.Llama that evaluates tokens under what its steerings do, and hands over none of another state.

    steerings, dials: those that may act, and how they stand. engine: as for SteeredLlama. Everything else is for
    HookedLlama.
    """

    def __init__(
        self,
        model_path: str | Path,
        file: ModelFile,
        arch: Architecture,
        steerings: Sequence[Steering],
        dials: Dials,
        *,
        engine: EngineName = "auto",
        **llama: Any,
    ) -> None:
        self.steerings = tuple(steerings)
        self._angles = dials
        self.cancelled: Callable[[], bool] | None = None  # asked before each batch; true ends it with Cancelled
        super().__init__(model_path, file, arch, **llama)
        self._cache_stamps = CacheStamps(len(self.input_ids), [each.fingerprint for each in self.steerings])
        self.token_readings = TokenReadings(self._hook, self.steerings, len(self.input_ids))
        everywhere = self.model_params.n_gpu_layers > file.block_count and llama_cpp.llama_supports_gpu_offload()
        self.engine = choose_engine(engine, self.steerings, offloaded=everywhere)
        self._engine: Engine = (
            HookEngine(self._hook, self.steerings) if self.engine == "hook" else LoraEngine(self, file, self.steerings)
        )

    # --- evaluating -------------------------------------------------------------------------------------------

    def evaluate(
        self,
        actions: Actions,
        tokens: Sequence[int],
        gated: tuple[bool, ...] = (),
        *,
        opens: bool = False,
        every_row: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Evaluate tokens under `actions` and stamp them with that state. gated: which steerings stand under a gate, ()
        for none; opens: an answer begins with the first token.

        every_row: returns the logits behind each token, (n, vocabulary) for each batch; only the last token's are kept
        otherwise, or every token's in `scores` with logits_all. Raises SteerError if a steering fails to act.
        """
        rows: list[NDArray[np.float32]] = []
        if len(tokens) == 0:
            return rows
        if self._rpc:
            check_servers(self._rpc)
        self._engine.apply(actions)
        begin = self.n_tokens
        try:
            self._ctx.kv_cache_seq_rm(-1, begin, -1)
            for first in range(0, len(tokens), self.n_batch):
                if self.cancelled is not None and self.cancelled():
                    raise Cancelled
                batch, at = tokens[first : first + self.n_batch], self.n_tokens
                self._batch.set_batch(batch, at, every_row or self._logits_all)
                self.token_readings.expect(at)
                self._ctx.decode(self._batch)
                self.token_readings.note(at, at + len(batch))
                self.input_ids[at : at + len(batch)] = batch
                if every_row or self._logits_all:
                    found = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(batch), self._n_vocab))
                    if self._logits_all:
                        self.scores[at : at + len(batch)] = found
                    rows += [found.copy()] if every_row else []
                self.n_tokens = at + len(batch)
            self._engine.check()
        except SteerError:
            self.reset()
            raise
        finally:
            if self.n_tokens > begin:
                self._cache_stamps.stamp(begin, self.n_tokens, self._cache_stamps.state(actions, gated), opens=opens)
        self._requires_eval = every_row  # what Llama would sample from are then not the logits of the last token alone
        return rows

    def evaluate_tree(self, actions: Actions, tree: TokenTree) -> NDArray[np.float32]:
        """Evaluate texts together under `actions`: the logits (n, vocabulary) behind the n tokens that are wanted.

        For who knows what llama.cpp's cache holds: nothing of it is any text's that is cached here; see `forget`.
        Raises as `evaluate` does.
        """
        if self._rpc:
            check_servers(self._rpc)
        if self.cancelled is not None and self.cancelled():
            raise Cancelled
        self._engine.apply(actions)
        batch = self._batch.batch
        batch.n_tokens = len(tree.tokens)
        for at, sequences in enumerate(tree.sequences):
            batch.token[at], batch.pos[at], batch.logits[at] = tree.tokens[at], tree.positions[at], tree.wanted[at]
            batch.n_seq_id[at] = len(sequences)
            for i, sequence in enumerate(sequences):
                batch.seq_id[at][i] = sequence
        self._ctx.decode(self._batch)
        self._engine.check()
        rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(sum(tree.wanted), self._n_vocab))
        return np.array(rows, np.float32)

    @property
    def sequences(self) -> int:
        """How many texts may be evaluated together."""
        return min(self._sequences, int(self._batch.n_seq_max))

    @property
    def all_off(self) -> Actions:
        """What the steerings do where all are off."""
        return (None,) * len(self.steerings)

    # --- the cache --------------------------------------------------------------------------------------------

    def usable(
        self, shared: int, length: int, prompt: Actions, last: Actions | None = None, gated: tuple[bool, ...] = ()
    ) -> int:
        """How many of the first `shared` cached tokens, which a prompt of `length` tokens begins with, an answer may
        use: under `prompt` it evaluates its prompt, under `last`, the same if None, the prompt's last token."""
        wanted = self._cache_stamps.wanted(prompt, prompt if last is None else last, gated)
        return self._cache_stamps.usable(shared, length, wanted)

    def cut_cache(self, tokens: Sequence[int], keep: int) -> None:
        """Forget what is cached of a prompt but for its first `keep` tokens, as `usable` counts them."""
        shared = self.shared(tokens)
        ready = keep == len(tokens) == self.n_tokens and not self._requires_eval  # its logits are there
        if not ready and self._slid_past(min(keep, len(tokens) - 1)):
            keep = 0
        if keep < shared:
            self.n_tokens = keep
            self._requires_eval = True

    def forget(self, begin: int = 0) -> None:
        """Forget all texts from their token `begin` on; of what stays, none counts as cached."""
        self.reset()
        memory = llama_cpp.llama_get_memory(self._ctx.ctx)
        llama_cpp.llama_memory_seq_rm(
            memory, -1, begin, -1
        )  # of every sequence; llama-cpp-python's own is of the first

    @property
    def window(self) -> int:
        """Tokens in the model's sliding window; 0 for none."""
        return int(llama_cpp.llama_model_n_swa(self._model.model))

    def _slid_past(self, count: int) -> bool:
        """Whether a sliding window that is kept no larger than it must be (swa_full=False) has lost what the token
        behind the first `count` looks back to. llama.cpp cuts such a cache without a word."""
        window = self.window
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self._ctx.ctx), 0) if window else 0
        return bool(first > max(0, count - window + 1))

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are cached, whatever state computed them."""
        n = min(self.n_tokens, len(tokens))
        differ = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], self.input_ids.dtype))
        return int(differ[0]) if len(differ) else n

    def keep(self, count: int) -> None:
        """Cut the cache to its first `count` tokens, or to none where a sliding window has moved past them."""
        if count and not self._slid_past(count) and self._ctx.kv_cache_seq_rm(-1, count, -1):
            self.n_tokens = count
            self._requires_eval = True
        else:
            self.reset()

    def save_state(self) -> Any:
        """As llama_cpp.Llama.save_state, with the steering state of every cached token."""
        state = super().save_state()
        state.steering = self._cache_stamps.save(self.n_tokens)
        return state

    def load_state(self, state: Any) -> None:
        """As llama_cpp.Llama.load_state. Tokens saved under another steering state are evaluated again when used."""
        super().load_state(state)
        self.token_readings.forget()
        saved = getattr(state, "steering", None)
        self._cache_stamps.load(self.n_tokens, saved, unsteered=not any(self._angles.actions()))
