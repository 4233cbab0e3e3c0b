# A judge that PPO never sees: pairs of the other half, and the instruct model instead of the SFT
# model. For train_pref.py, after the recipe of the model that it judges:
# $ python train_pref.py config/smollm2/reward.py config/smollm2/judge.py
# $ python train_pref.py config/smollm2/reward.py config/smollm2/cost.py config/smollm2/judge.py
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
data = "pku_saferlhf/halves/judge:1500/-1"
eval_data = ""  # nanosafe.eval.scores tests all models at the end
