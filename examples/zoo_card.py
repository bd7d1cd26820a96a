def base(name, figures): return "TODO"
def tuned(name, base, figures): return "TODO"
