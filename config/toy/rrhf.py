# The toy world's RRHF: eight answers of the supervised policy to each prompt, ranked by the reward
# model: $ python sample.py --model=out/demo/sft/model --prompts=toy/prompts --num_samples=8
#   --reward_model=out/demo/reward/model --max_new_tokens=64 --out=out/demo/answers.jsonl
objective = "rrhf"
out_dir = "out/demo/rrhf"
init_from = "out/demo/sft/model"
data = "out/demo/answers.jsonl"
eval_data = "toy/reward/test"
epochs = 1.0
batch_size = 16
warmup_ratio = 0.1
learning_rate = 3e-4
max_new_tokens = 64
save_interval = 0
