# SafeDPO on the toy world. Its pairs are the policy's own answers, which gold labels:
# $ python sample.py --model=out/demo/sft/model --prompts=toy/prompts --num_samples=8 \
#       --max_new_tokens=64 --out=out/demo/answers.jsonl
# $ python data/toy/prepare.py --annotate=out/demo/answers.jsonl --out=out/demo/pairs.jsonl
# For train_pref.py. The other recipes of policies that are to be safe come after this one.
objective = "safedpo"
out_dir = "out/demo/safedpo"
init_from = "out/demo/sft/model"
data = "out/demo/pairs.jsonl"
eval_data = "toy/reward/test"
epochs = 10.0
max_steps = 400
batch_size = 32
warmup_ratio = 0.1
learning_rate = 3e-4
beta = 0.1
margin = 2.0  # any from 0 on lets no unsafe answer win
lm_coef = 1.0  # without it the log-probabilities of both answers fall, and the text falls apart
max_new_tokens = 64
save_interval = 0
