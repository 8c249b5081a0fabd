"""Free TCP ports of this machine, for ranks and daemons that start in a moment.

They lie below the ephemeral ports. One of those, which the kernel would offer, may be the near end of somebody's
connection before the one who asked for it listens: ranks that connect to each other take dozens of them.
"""

import contextlib
import secrets
import socket

PORTS = range(10000, 30000)


def free_ports(count: int) -> list[int]:
    """Return different ports of 127.0.0.1 that are free now."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", secrets.choice(PORTS)))
                ports.append(probe.getsockname()[1])
        return ports


def free_port() -> int:
    return free_ports(1)[0]
