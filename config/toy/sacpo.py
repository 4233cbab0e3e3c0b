# SACPO on the toy world: a policy that DPO made helpful learns what is safer, with itself as the
# reference. For train_pref.py, after SafeDPO's recipe; P-SACPO is a mixture of the two policies:
# $ python train_pref.py config/toy/dpo.py
# $ python train_pref.py config/toy/safedpo.py config/toy/sacpo.py
# $ python -m nanosafe.checkpoint out/demo/dpo/model out/demo/sacpo/model --merge=0.5 \
#       out/demo/p_sacpo/model
objective = "dpo"
rank_by = "safer"
init_from = "out/demo/dpo/model"  # loading SFT here would lose what the first stage learnt
out_dir = "out/demo/sacpo"
beta = 0.1  # the paper's beta / lambda
