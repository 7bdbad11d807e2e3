"""How ``search`` and ``search_all`` run branches on vLLM's ``LLM``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from leafkernels._core.checks import check_count
from leafkernels.lookahead.search import Best
from leafkernels.lookahead.vllm.branches import Branches
from leafkernels.lookahead.vllm.engine import check_engine, outputs_of, sampling


class VLLMStepper:
    """The two methods that ``search`` calls, on a ``vllm.LLM`` of ``engine_arguments``.

    A branch is a request with its ids; vLLM's prefix cache holds what it shares with others, in whole blocks. Requests
    run ``ahead`` tokens, so that a search of that chunk asks the engine once a fork.

    Args:
        llm: ``vllm.LLM(**engine_arguments(model, channel))``.
        ahead: tokens that a request runs: the chunk of the search. With a multiple of it the branch that takes the best
            token at forks needs fewer requests, and what it has run is lost where it loses.
        eos_token_ids: of the search: no request runs on after such an id.
        suppress_tokens: ids that no branch takes.
    """

    def __init__(
        self,
        llm: Any,
        *,
        ahead: int = 1,
        eos_token_ids: Sequence[int] = (),
        suppress_tokens: Sequence[int] = (),
    ) -> None:
        check_count("ahead", ahead, 1)
        self._llm, self._config = llm, llm.llm_engine.model_config
        check_engine(self._config)
        self._ends, self._suppressed = tuple(eos_token_ids), frozenset(suppress_tokens)
        self._branches = Branches(ahead, self._config.max_model_len - 1, self._ends)
        self.num_requests = self.num_computed = self.num_asked = 0
        """Requests so far, tokens that the engine has run for them, and those with what its prefix cache held."""

    def prefill(self, prompt_ids: Tensor | Sequence[Tensor]) -> tuple[Best, Tensor]:
        """Run a prompt (P,), or B of any lengths: the best next tokens of each, and rewards (B,) of their last."""
        prompts = [prompt_ids] if isinstance(prompt_ids, Tensor) else prompt_ids
        self._branches.begin([prompt.tolist() for prompt in prompts])
        return self._run()

    def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Best, Tensor]:
        """Append ``token_ids`` (S,) to branches ``parents`` (S,) of the call before: the best tokens, rewards (S,)."""
        self._branches.grow(parents.tolist(), token_ids.tolist())
        return self._run()

    def _run(self) -> tuple[Best, Tensor]:
        requests = [request for request in self._branches.requests if not request.is_done]
        if requests:
            params = [
                sampling(self._config, self._ends, sorted(self._suppressed), max_tokens=request.ahead)
                for request in requests
            ]
            prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
            for request, found in zip(requests, self._llm.generate(prompts, params, use_tqdm=False), strict=True):
                (output,) = found.outputs
                request.outputs = outputs_of(output.token_ids, output.logprobs, self._suppressed)
                request.is_done = True
                asked = len(request.token_ids) + len(request.outputs) - 1
                self.num_asked += asked
                self.num_computed += asked - (found.num_cached_tokens or 0)
            self.num_requests += len(requests)
        return self._branches.results()
