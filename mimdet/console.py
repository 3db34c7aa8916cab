"""What a command says when it ends."""

import signal


class Stopped(Exception):
    """Work was asked to end, and has been saved: the same call goes on."""

    signal_number = int(signal.SIGINT)

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook instead of a traceback."""
        return [str(self)]
