"""`edge-steer serve`: an OpenAI-compatible server, and a page with dials."""

from __future__ import annotations

from typing import Any

import click

from edge_steer.cli import options


# What a client that says nothing expects is some variety, as llama-server has it.
@click.command(context_settings={"default_map": {"temperature": 0.8}})
@options.model_option
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
@options.sampling_options
@options.run_options
@options.rpc_option
def serve(
    model: str,
    steering: tuple[str, ...],
    angle: float | None,
    strength: float | None,
    scope: str,
    engine: str,
    host: str,
    port: int,
    api_key: str | None,
    cors: tuple[str, ...],
    allow_host: tuple[str, ...],
    queue: int,
    open_page: bool,
    ctx: int | None,
    gpu_layers: int,
    threads: int | None,
    seed: int,
    chat_template: str | None,
    rpc: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Serve a model to other programs (OpenAI's interface), and a page with dials.

    Each request may set its own dials, by a field `steering` or in the model's name. The sampling options stand for
    what a request leaves out.

    \b
    edge-steer serve -m qwen2.5-coder-0.5b -s happy.gguf --open
    """
    from functools import partial
    from pathlib import Path

    try:
        from edge_steer.serve.run import Address
        from edge_steer.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise click.UsageError(f"{error.name} is missing; pip install 'edge-steer[serve]'") from None
    from edge_steer.serve.app import make_app
    from edge_steer.serve.guard import Rules
    from edge_steer.serve.service import Service
    from edge_steer.serve.worker import Worker

    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        options.note(f"anyone who reaches {host}:{port} may use this model; give --api-key")
    services: list[Service] = []

    def load() -> Any:
        llm = options.open_model(
            model, steering, angle=angle, strength=strength, scope=scope, engine=engine,
            may_be_off=True, ctx=ctx, gpu_layers=gpu_layers, threads=threads, seed=seed, chat_template=chat_template,
            rpc=rpc,
        )  # fmt: skip
        name = Path(llm.model_path).stem if Path(model).is_file() else model
        services.append(Service(llm, Worker(llm, queue), name, options.sampling(seed=seed, **sampling)))
        return make_app(services[0], Rules(api_key, cors, allow_host))

    def close() -> None:
        for service in services:
            service.worker.close()
            service.llm.close()

    run(Address(host, port), load, close=close, note=partial(click.echo, err=True), open_page=open_page)
