"""
Ctrl-C: the first one finishes the step, saves and leaves; a second one leaves at once.
"""
import signal
import sys
import threading


class Interrupt:
    """ `asked` is true once Ctrl-C was pressed. `stop(sentence)` ends the run. """

    def __init__(self, name, stop):
        self.name, self.stop, self.asked, self.previous = name, stop, False, None
        sys.excepthook = self.on_exception

    def watch(self):
        """ From here on Ctrl-C waits for the end of the step. """
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.on_signal)

    def leave(self):
        """ From here on Ctrl-C is as before. """
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def on_signal(self, *_):
        if self.asked:
            self.stop("left at once; the last checkpoint is whole, --resume=True goes on from it.")
        self.asked = True
        print("  stopping after this step ..")

    def on_exception(self, kind, e, trace):
        """ Ctrl-C before the loop or after it: a sentence, not a traceback. """
        if kind is KeyboardInterrupt:
            print(f"{self.name}: interrupted; what was saved is whole, --resume=True goes "
                  "on.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, e, trace)
