"""Names and pickles made to harm, shared by the tests of safety."""

from pathlib import Path

ODD = 'it\'s a "model" with $HOME, `ticks`; & ünï\ncode *?'


class Bomb:
    """What a pickle may do when it is loaded: anything."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))
