"""Small runs of papers' claims, one folder each.

    experiments/<paper>/run.py       `run(workdir, variant) -> Outcome`
                        README.md    claim, command, what differs from the paper
                        result.json  claims with verdicts    \
                        results.csv  one row a run            | written by
                        results.png                           | run.py
                        a block of README.md                 /

`arms` runs configs under several seeds and survives being killed, `tables` and
`plots` show them, `outcome` states what was found, `command` is the main of
every run.py. `python -m experiments.report` gathers all results.
"""
