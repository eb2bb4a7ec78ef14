"""``python -m mate info`` prints what this machine has, ``python -m mate warmup`` compiles GPU kernels ahead."""

from __future__ import annotations

import argparse

import torch

from mate import info, warmup


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mate", description="MATE, exact attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="print the version, and the backends, instruction sets and devices of this machine"
    ).set_defaults(run=_info)

    ahead = commands.add_parser("warmup", help="compile the GPU kernels that a model needs; no GPU is needed")
    ahead.add_argument("--head-dim", type=int, required=True, metavar="D", help="head size of queries and keys")
    ahead.add_argument("--head-dim-v", type=int, metavar="DV", help="head size of values (default: D)")
    ahead.add_argument(
        "--dtype",
        nargs="+",
        choices=("bfloat16", "float16", "float8_e4m3fn"),
        default=["bfloat16"],
        help="type of queries (default: bfloat16)",
    )
    ahead.add_argument("--kv-dtype", choices=("float8_e4m3fn",), help="type of keys and values (default: DTYPE)")
    ahead.add_argument(
        "--out-dtype", choices=("float16",), help="type of results (default: DTYPE, or bfloat16 for float8_e4m3fn)"
    )
    ahead.add_argument("--softcap", action="store_true", help="for calls with a softcap")
    ahead.add_argument("--qv", action="store_true", help="for calls with qv (multi-head latent attention)")
    ahead.add_argument("--jobs", type=int, metavar="N", help="kernels compiled at once (default: one per processor)")
    ahead.set_defaults(run=_warmup)

    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None


def _info(arguments: argparse.Namespace) -> None:
    for name, value in info().items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"{name}.{key}: {text}")
        else:
            print(f"{name}: {value}")


def _warmup(arguments: argparse.Namespace) -> None:
    compiled = warmup(
        arguments.head_dim,
        arguments.head_dim_v,
        [getattr(torch, name) for name in arguments.dtype],
        kv_dtype=arguments.kv_dtype and getattr(torch, arguments.kv_dtype),
        out_dtype=arguments.out_dtype and getattr(torch, arguments.out_dtype),
        softcap=arguments.softcap,
        qv=arguments.qv,
        jobs=arguments.jobs,
    )
    print(f"{compiled} kernels compiled")


if __name__ == "__main__":
    main()
