"""`edge-steer serve`: an OpenAI-compatible server, and a page with dials."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_steer.cli import options
from edge_steer.cli.opening import open_model

if TYPE_CHECKING:
    from edge_steer.serve.guard import Rules
    from edge_steer.serve.service import Service

_UPSTREAM_BYTES = 128 << 20  # of a request that goes through: it may hold pictures


# What a client that says nothing expects is some variety, as llama-server has it.
@click.command(context_settings={"default_map": {"temperature": 0.8}})
@click.option("-m", "--model", metavar="MODEL", help="A .gguf file or a name from `edge-steer models`.")
@options.steering_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option(
    "--api-key", envvar="EDGE_STEER_API_KEY", help="Key that every request must bear. [env: EDGE_STEER_API_KEY]"
)
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="Web page that may ask, as http://localhost:3000; repeats."
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Name by which this machine is called; repeats.")
@click.option("--queue", type=click.IntRange(0, 10_000), default=64, show_default=True, help="Requests that may wait.")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--metrics", is_flag=True, help="Tell counts at /metrics, for Prometheus.")
@click.option("--upstream", metavar="URL", help="Put the dials in front of this llama-server, in place of --model.")
@click.option(
    "--upstream-key", envvar="EDGE_STEER_UPSTREAM_KEY", help="llama-server's key, in place of what a client bears."
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="NAME=COS,SIN",
    help="A steering's adapters, as llama-server numbers them; repeats.",
)
@options.sampling_options
@options.run_options
@options.rpc_option
def serve(
    model: str | None,
    steered: options.SteeringOptions,
    run: options.RunOptions,
    sampling: options.SamplingOptions,
    host: str,
    port: int,
    api_key: str | None,
    cors: tuple[str, ...],
    allow_host: tuple[str, ...],
    queue: int,
    open_page: bool,
    metrics: bool,
    upstream: str | None,
    upstream_key: str | None,
    adapter: tuple[str, ...],
) -> None:
    """Serve a model to other programs (OpenAI's interface), and a page with dials.

    Each request may set its own dials, by a field `steering` or in the model's name. The sampling options stand for
    what a request leaves out.

    \b
    edge-steer serve -m qwen2.5-coder-0.5b -s happy.gguf --open
    edge-steer serve --upstream http://127.0.0.1:8081 -s happy.gguf
    """
    try:
        from edge_steer.serve.run import Address
        from edge_steer.serve.run import serve as serve_until_stopped
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is missing; pip install 'edge-steer[serve]'") from None
    _check_mode(click.get_current_context(), upstream)
    from edge_steer.serve.app import make_app
    from edge_steer.serve.guard import Rules

    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        options.note(f"anyone who reaches {host}:{port} may use this model; give --api-key")
    rules = Rules(api_key, cors, allow_host)
    services: list[Service] = []

    def load() -> Any:
        if model is None:
            return _in_front_of(str(upstream), upstream_key, adapter, steered, rules)
        services.append(_service(model, steered, run, sampling, queue, metrics=metrics))
        return make_app(services[0], rules)

    def close() -> None:
        for service in services:
            service.worker.close()
            service.llm.close()

    serve_until_stopped(Address(host, port), load, close=close, note=partial(click.echo, err=True), open_page=open_page)


def _service(
    model: str,
    steered: options.SteeringOptions,
    run: options.RunOptions,
    sampling: options.SamplingOptions,
    queue: int,
    *,
    metrics: bool,
) -> Service:
    """A model that runs here, and what answers for it."""
    from edge_steer.serve.service import Service
    from edge_steer.serve.worker import Worker

    llm = open_model(model, steered, run, may_be_off=True)
    name = Path(llm.model_path).stem if Path(model).is_file() else model
    return Service(llm, Worker(llm, queue), name, sampling.with_seed(run.seed), metrics=metrics)


# What says something to the server itself, or to llama-server; all other options are of a model that runs here.
_FOR_UPSTREAM = {
    "steering", "angle", "strength", "host", "port", "api_key", "cors", "allow_host", "open_page", "upstream",
    "upstream_key", "adapter",
}  # fmt: skip


def _check_mode(context: click.Context, upstream: str | None) -> None:
    """Refuse options that say nothing to what is served."""
    from click.core import ParameterSource

    given = {
        parameter.name: parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }
    if upstream is None:
        if "model" not in given:
            raise click.UsageError("expected -m MODEL, or --upstream URL of a llama-server")
        if wrong := [given[name] for name in ("upstream_key", "adapter") if name in given]:
            raise click.UsageError(f"{wrong[0]} is for --upstream")
    elif wrong := [option for name, option in given.items() if name not in _FOR_UPSTREAM]:
        raise click.UsageError(f"{wrong[0]} is for a model that runs here; with --upstream, tell llama-server")
    elif "steering" not in given:
        raise click.UsageError("expected -s FILE, the steering whose adapters llama-server has")


def _in_front_of(
    url: str, key: str | None, adapter: tuple[str, ...], steered: options.SteeringOptions, rules: Rules
) -> Any:
    """The application in front of a llama-server."""
    from edge_steer.runtime.dials import named_steerings
    from edge_steer.serve.adapters import parse_order
    from edge_steer.serve.upstream import make_upstream_app
    from edge_steer.serve.upstream_start import open_upstream

    order = parse_order(adapter)
    steerings, dials = named_steerings(
        steered.steering, angle=steered.angle, strength=steered.strength, may_be_off=True
    )
    front = open_upstream(url, steerings, dials, key=key, order=order, note=options.note)
    return make_upstream_app(front, replace(rules, body_bytes=_UPSTREAM_BYTES))
