"""``python -m leafkernels.lookahead serve``: an engine of vLLM with a channel, behind an HTTP server."""

import argparse
import asyncio
import dataclasses
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from leafkernels.lookahead.vllm.asked import Limits, check_limits


def main(argv: Sequence[str]) -> int:
    """Serve until it is interrupted, and return the exit code."""
    own, engine_argv = _parse(argv)
    limits = Limits(*(getattr(own, name) for name in Limits._fields))
    check_limits(limits)
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError("serving needs vLLM: pip install -e '.[vllm]'") from error
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from leafkernels.lookahead.vllm.engine import engine_arguments

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="python -m leafkernels.lookahead serve"))
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(engine_argv))
    if not isinstance(args.hf_overrides or {}, dict):
        raise ValueError(f"--hf-overrides must be an object, got {args.hf_overrides!r}")
    more = {"hf_overrides": dict(args.hf_overrides or {}), "trust_remote_code": args.trust_remote_code}
    found = engine_arguments(own.model, own.channel, width=limits.max_width, **more)
    served = args.served_model_name or found["model"]
    args = dataclasses.replace(args, **found, served_model_name=served)
    asyncio.run(_serve(args, own, limits))
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m leafkernels.lookahead serve",
        description=__doc__,
        epilog="Other options are those of vLLM's engine, as --dtype, --max-model-len or --tensor-parallel-size.",
        allow_abbrev=False,
    )
    default = Limits()
    parser.add_argument("--model", help="folder or name of the model (default: the one the channel names)")
    parser.add_argument("--channel", required=True, help="folder that RewardTransformer.save_pretrained wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000; 0: any that is free)")
    parser.add_argument("--api-key", help="what clients must send (default: nothing)")
    counts = {
        "max_width": "largest width of a search",
        "max_branches": "most branches of a search",
        "all_branches": "most branches of all searches that run; others wait",
        "max_waiting": "most searches that wait; others are answered with 429",
        "width": "best tokens that a branch forks into, where a request does not say",
        "chunk": "tokens from fork to fork, where a request does not say",
        "depth": "chunks to look ahead, where a request does not say",
    }
    for name, said in counts.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{said} (default: {value})")
    parser.add_argument(
        "--min-p", type=float, default=default.min_p, help="least share of the best token's probability to fork into"
    )
    return parser.parse_known_args(argv)


async def _serve(args: Any, own: argparse.Namespace, limits: Limits) -> None:
    import uvicorn
    from vllm.v1.engine.async_llm import AsyncLLM

    from leafkernels.lookahead.vllm.model import check_config
    from leafkernels.lookahead.vllm.server import Server

    config = args.create_engine_config()
    check_config(config)  # the engine's process would say it amid its log
    engine = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
    try:
        app = Server(engine, limits, own.api_key).app()
        config = uvicorn.Config(app, own.host, own.port, log_level="warning", timeout_graceful_shutdown=5)
        socket = config.bind_socket()
        server = uvicorn.Server(config)
        # uvicorn would raise the signal again at its end, before the engine's processes are told.
        server.capture_signals = nullcontext
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, setattr, server, "should_exit", True)
        serving = asyncio.create_task(server.serve(sockets=[socket]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.05)
        if server.started:
            # Where the port was 0, nobody knows it yet.
            print(f"leafkernels.lookahead: http://{own.host}:{socket.getsockname()[1]}/v1", flush=True)
        await serving
    finally:
        engine.shutdown()
