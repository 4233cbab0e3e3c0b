from config.phf.shared import *  # PHF on toxicity; then a method beside it

out_dir = "out/phf/toxicity"
tokenizer = "models/gpt2"
data = "phf/toxicity"
scorer = "toxicity"
