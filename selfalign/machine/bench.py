topics = ['sampling', 'grading', 'training', 'startup', 'scale']
def bench(*a): raise NotImplementedError
def bench_table(*a): raise NotImplementedError
