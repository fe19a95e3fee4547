"""Runs a script in a forked process of the tests (`tests.support.programs.relayed`) in place of this new interpreter.

    relay.py SCRIPT ARGUMENT ...

A launcher starts this file, which imports no large library. The forked process has the environment that the launcher has set.
"""

import json
import os
import socket
import sys


def main() -> int:
    """Returns the exit status of the forked process, and prints what it has printed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["RELAY"])
        with connection.makefile("rw") as stream:
            print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}), file=stream, flush=True)
            ended = json.loads(stream.readline())
    sys.stdout.write(ended["output"])
    sys.stderr.write(ended["errors"])
    return ended["status"]


if __name__ == "__main__":
    sys.exit(main())
