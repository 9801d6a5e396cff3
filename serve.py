#!/usr/bin/env python
"""Serve a trained model: OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models) and a page to talk to it.

Listens on this machine alone unless --host says otherwise, and then wants a key. The server is in web/, what makes
the answers in llama/engine.py. stdout carries the address, stderr the log.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llama.command_line import LATEST, Parser, checkpoint_at

if TYPE_CHECKING:  # torch takes seconds to import: --help and wrong flags must not wait for it
    from llama.engine import Engine
    from llama.generation import Doctor
    from web.service import Service

KEY = "CHATDOCTOR_API_KEY"
SHORTEST_KEY = 16


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    p = Parser("serve.py", __doc__)
    add = p.add_argument
    add("--checkpoint", metavar="DIR", help=f"model directory or GGUF file; default: the one named in {LATEST}")
    add("--model_name", default="chatdoctor", metavar="NAME", help="what requests call the model (chatdoctor)")
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1); another one needs a key")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on (8000); 0: any that is free")
    add(
        "--api_key_file",
        metavar="FILE",
        help=f"file with the key that requests must show; or the environment's {KEY}",
    )
    add(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that the server goes by, in a Host header; repeatable",
    )
    add(
        "--allow_origin",
        action="append",
        default=[],
        metavar="URL",
        help="pages from https://NAME may ask this server (CORS); repeatable",
    )
    add("--rows", type=int, default=32, metavar="N", help="answers side by side (32)")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait; those beyond get 429 (64)")
    add("--max_new_tokens", type=int, metavar="N", help="longest answer, where a request does not say")
    add(
        "--on_overflow",
        choices=["drop", "refuse"],
        default="drop",
        help="when a dialogue outgrows the context: leave out its oldest turns (drop), or refuse the request",
    )
    add(
        "--triage",
        choices=["on", "off"],
        default="on",
        help="say at once what the rules in data/rules/ find urgent (on)",
    )
    add("--diseases", metavar="FILE.db", help="answer from rows of this disease database, with citations")
    add("--feedback", metavar="FILE.db", help="keep rated answers here, once their users have agreed")
    add("--patience", type=float, default=30, metavar="S", help="seconds for running answers when asked to stop (30)")
    add("--open", action="store_true", help="open the page in a browser, where there is a screen")
    add("--log_texts", action="store_true", help="log what went wrong with its words, which may be a patient's")
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the weights are stored")
    add("--kernels", default="auto", metavar="K", help="auto (our Triton kernels on a GPU), triton, torch, ...")
    args = p.parse_args(argv)
    for name, least in (("rows", 1), ("queue", 0), ("port", 0), ("patience", 0)):
        if getattr(args, name) < least:
            p.error(f"--{name} is {getattr(args, name)}; it must be {least} or more")
    if args.port > 65535:
        p.error(f"--port is {args.port}; the last one is 65535")
    return args


def run(argv: list[str]) -> int:
    args = parse(argv)
    key = _key(args.api_key_file)
    if not _loopback(args.host) and key is None:
        raise ValueError(
            f"--host {args.host} is open to other machines: give the server a key, in {KEY} or --api_key_file FILE"
        )
    path = checkpoint_at(args.checkpoint)
    try:
        from web.server import Server, listen
    except ModuleNotFoundError as e:
        raise ValueError(f"the server needs {e.name}: pip install 'chatdoctor-from-scratch[serve]', or make") from None
    from web.app import application
    from web.guard import Access
    from web.limits import Limits
    from web.service import Service

    listener = listen(args.host, args.port)
    service = Service(args.model_name, Limits())
    service.triage = args.triage == "on"
    if args.feedback is not None:
        from data.feedback import Feedback

        service.feedback = Feedback(Path(args.feedback).expanduser())
    access = Access(key, _hosts(args), frozenset(o.rstrip("/") for o in args.allow_origin))
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    print(f"{url} is the page, {url}v1 the API", flush=True)
    if args.open:
        _open(url)
    server = Server(application(service, access, log_texts=args.log_texts), service, args.patience)
    ended = server.serve_on(listener, lambda: _load(args, path, service))
    return 0 if ended else 1


def _open(url: str) -> None:
    """Show the page; it says itself that the model is being loaded. Never in a terminal, which a browser would take."""
    import webbrowser

    if sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        webbrowser.open(url)


def _load(args: argparse.Namespace, path: Path, service: Service) -> tuple[Doctor, Engine]:
    """The model and what runs it; the triage rules too, or the first question would wait for them (0.1 s)."""
    import torch

    from data import triage
    from llama import checkpoint, placement
    from llama.engine import Engine
    from llama.generation import Doctor

    if service.triage:
        triage.load()
    params, max_new_tokens = placement.settings(path, vars(args))
    device = placement.found(args.device)
    model = placement.on_device(path, device, args.dtype and getattr(torch, args.dtype), args.kernels, None, None)
    doctor = Doctor(
        name=str(path),
        model=model,
        tokenizer=checkpoint.load_tokenizer(path),
        chat_format=checkpoint.load_chat_format(path),
        params=params,
        max_new_tokens=max_new_tokens,
        weights=f"int{scheme.bits}" if (scheme := checkpoint.load_scheme(path)) else "",
        on_overflow=args.on_overflow,
    )
    doctor.request([doctor.tokenizer.bos_id])  # checks the rest of the settings
    if args.diseases is not None:
        from data import grounding

        database = Path(args.diseases).expanduser()
        service.grounding = grounding.beside(database, doctor.tokenizer, doctor.chat_format, doctor.place(), cards=True)
    print(doctor.describe(), file=sys.stderr, flush=True)
    return doctor, Engine(doctor, args.rows, args.queue)


def _key(file: str | None) -> str | None:
    """The key, from a file or the environment; never from the command line, which every user of a machine can read."""
    if file is None:
        key, name = os.environ.get(KEY), KEY
    else:
        name = file
        try:
            key = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"--api_key_file {file}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise ValueError(f"the key in {name} must be {SHORTEST_KEY} characters or more, without spaces")
    return key


def _loopback(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(args: argparse.Namespace) -> frozenset[str] | None:
    """Names that a Host header may have. On a public address any will do if none is given: the key protects it."""
    if not _loopback(args.host) and not args.allowed_host:
        return None
    return frozenset(name.lower() for name in ("localhost", "127.0.0.1", "::1", args.host, *args.allowed_host))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after an orderly end, 1 after a hurried one, 2 for what the user can put right."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
