"""The command line, `mwc`, also `python -m mwc`.

`main` lists the commands; `functions` and `target` hold them, `demo` the tour;
`subject` makes a decorated function and its arguments of what the user wrote, with
`loading` (names of functions) and `shapes` (texts of arguments); `running` says how
commands end: 0 is fine, 1 a negative result, 2 bad input with one line on standard
error. None of them imports JAX before a command runs that needs it.
"""
