"""The search for the best deployment: what may be tried, who does the work, what is kept, and how it is decided.

jobs        one step of work: a pure function of what it names
machines    what a machine is, as far as results hang on it
turns       whose turn it is, and where
pool        what executors share; executor: processes of this machine; ray_executor: a Ray cluster
child       a process that does jobs: guard keeps it from leaving anything behind, worker is what runs in it
shards      calibration in parts
cache       results by content: nothing is done twice, and a killed run loses the job in flight
schema      what optimize.json holds; `reading` validates it
views       a search as a table and as Markdown; `page` is its page. Both are functions of optimize.json
"""
