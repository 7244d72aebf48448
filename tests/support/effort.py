"""How much Python a call does, as a number that does not depend on the machine or its load."""

import sys


def calls(function):
    """Returns how many Python functions `function()` calls, itself included."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count
