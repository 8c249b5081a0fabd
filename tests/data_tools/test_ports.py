"""Ports for ranks: different, free, and none that the kernel gives to connections."""

import socket

from data_tools.base.ports import PORTS, free_ports


def test_free_ports_are_different_and_no_ephemeral_ones():
    assert PORTS.stop <= 32768  # the first of Linux's
    found = free_ports(50)
    assert len(set(found)) == 50 and set(found) <= set(PORTS)


def test_a_port_that_is_taken_is_not_offered(monkeypatch):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_ports(1)[0]))
        taken = holder.getsockname()[1]
        monkeypatch.setattr("data_tools.base.ports.PORTS", range(taken, taken + 40))
        assert taken not in free_ports(20)
