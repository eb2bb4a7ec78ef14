"""``python -m mate info`` prints what this machine has."""

from __future__ import annotations

import argparse

from mate import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mate", description="MATE, exact attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="print the version, and the backends, instruction sets and devices of this machine"
    )
    parser.parse_args()
    for name, value in info().items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"{name}.{key}: {text}")
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
