"""The `magihuman` command, but for `export`.

`main` has the commands, `serve`, `verify` and `score` those with a file of their own. `console` has
what they share: options, tables, exit codes. `inspect` gathers facts as data, which they print.
"""
