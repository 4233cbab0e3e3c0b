from config.phf.shared import *  # PHF on pii; then a method beside it

out_dir = "out/phf/pii"
tokenizer = "models/gpt2"
data = "phf/pii"
scorer = "pii"
