"""How a search runs on vLLM's ``AsyncLLM``, beside others on the same engine."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from leafkernels._core.checks import check_count
from leafkernels.lookahead.search import Best, Options, Search, begin
from leafkernels.lookahead.vllm.branches import Branches, Request
from leafkernels.lookahead.vllm.engine import check_engine, outputs_of, sampling


class AsyncVLLMStepper:
    """``VLLMStepper`` on an ``AsyncLLM``, for one search of ``search_async``.

    Requests of branches that the search has dropped are aborted; so are all of them where it is cancelled.

    Args:
        engine: ``AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(model, channel)))``.
        others: as for ``VLLMStepper``.
    """

    def __init__(
        self, engine: Any, *, ahead: int = 1, eos_token_ids: Sequence[int] = (), suppress_tokens: Sequence[int] = ()
    ) -> None:
        check_count("ahead", ahead, 1)
        self._engine, self._config = engine, engine.model_config
        check_engine(self._config)
        self._ends, self._suppressed = tuple(eos_token_ids), frozenset(suppress_tokens)
        self._branches = Branches(ahead, self._config.max_model_len - 1, self._ends)
        self._tasks: dict[Request, asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    async def prefill(self, prompt_ids: Tensor) -> tuple[Best, Tensor]:
        """Run a prompt (P,): its best next tokens, and the reward (1,) of its last."""
        self._branches.begin([prompt_ids.tolist()])
        return await self._run()

    async def extend(self, parents: Tensor, token_ids: Tensor) -> tuple[Best, Tensor]:
        """Append ``token_ids`` (S,) to branches ``parents`` (S,) of the call before: the best tokens, rewards (S,)."""
        self._branches.grow(parents.tolist(), token_ids.tolist())
        return await self._run()

    async def close(self) -> None:
        """Abort what runs."""
        tasks = [*self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> tuple[Best, Tensor]:
        while True:
            self._news.clear()
            self._branches.replace_lost()
            wanted = self._branches.requests
            for request in self._tasks.keys() - set(wanted):
                self._tasks.pop(request).cancel()
            for request in wanted:
                if request not in self._tasks:
                    self._tasks[request] = asyncio.create_task(self._follow(request))
                elif self._tasks[request].done():
                    self._tasks[request].result()  # raises what has ended it
            if all(branch.has_run for branch in self._branches.live):
                return self._branches.results()
            await self._news.wait()

    async def _follow(self, request: Request) -> None:
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        params = sampling(
            self._config, self._ends, sorted(self._suppressed), max_tokens=request.ahead, output_kind=kind
        )
        try:
            # Where this task is cancelled, the engine's generator aborts the request.
            asked = {"prompt_token_ids": request.token_ids}
            async for found in self._engine.generate(asked, params, uuid4().hex):
                (output,) = found.outputs
                request.outputs += outputs_of(output.token_ids, output.logprobs or [], self._suppressed)
                self._news.set()
        finally:
            request.is_done = True
            self._news.set()


async def search_async(
    stepper: Any, prompt_ids: Tensor, *, on_commit: Callable[[list[int]], None] | None = None, **options: Any
) -> Search:
    """``search`` with a stepper whose two methods are awaited; it is closed at the end, however that comes.

    Args:
        stepper: an ``AsyncVLLMStepper``.
        prompt_ids, on_commit, options: as in ``search``.

    Returns:
        ``Search``. A search that is cancelled leaves no request in the engine.
    """
    try:
        run = begin(prompt_ids, on_commit, Options(**options))
        logits, rewards = await stepper.prefill(prompt_ids)
        while True:
            try:
                parents, token_ids = run.send((logits, rewards.tolist()))
            except StopIteration as end:
                found: Search = end.value
                return found
            logits, rewards = await stepper.extend(torch.tensor(parents), torch.tensor(token_ids))
    finally:
        await stepper.close()
