"""
Ctrl-C while training: the first one lets the step finish, saves and exits; a second one exits at
once.
"""
import signal
import sys
import threading


class Interrupt:
    """
    Handles Ctrl-C of a run: `asked` is True after the first one. stop(sentence) ends the run.
    """

    def __init__(self, name, stop):
        self.name, self.stop, self.asked, self.previous = name, stop, False, None
        sys.excepthook = self.on_exception

    def watch(self):
        """ From here on, Ctrl-C waits for the end of the step. """
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.on_signal)

    def leave(self):
        """ Restore the previous handling of Ctrl-C. """
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def on_signal(self, *_):
        if self.asked:
            self.stop("exited at once; the last checkpoint is intact, and --resume=True continues "
                      "from it.")
        self.asked = True
        print("  finishing this step, then saving (Ctrl-C again exits at once) ..")

    def on_exception(self, kind, e, trace):
        """
        Print a sentence instead of a traceback for Ctrl-C before or after the training loop.
        """
        if kind is KeyboardInterrupt:
            print(f"{self.name}: interrupted; saved files are intact. If there is a checkpoint, "
                  "--resume=True continues.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, e, trace)
