"""The search for the best deployment: what may be tried, who does the work, what is kept, and how it is decided.

jobs        one step of work: a pure function of what it names
executor    who does jobs: processes of this machine, or a Ray cluster
cache       results by content: nothing is done twice, and a killed run loses the job in flight
schema      what optimize.json holds; `reading` validates it
views       a search as a table and as Markdown; `page` is its page. Both are functions of optimize.json
"""
