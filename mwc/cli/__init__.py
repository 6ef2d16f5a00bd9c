"""The command line, `mwc`, also `python -m mwc`.

`main` lists the commands; `functions` and `target` hold them, `demo` the tour over
`network`. `subject` makes a decorated function and its arguments of what `options`
takes, with `loading` (names of functions), `shapes` (texts of arguments) and `filling`
(numbers for shapes). `running` says how commands end: 0 is fine, 1 a negative result, 2
bad input with one line on standard error.

JAX is imported when a command runs that needs it, and not before.
"""
