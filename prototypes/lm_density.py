"""strata by losses of the target alone, on train lm's tasks, in process."""
import sys, time
from dataclasses import replace
import numpy as np, torch
torch.set_num_threads(1)
from equipoise_trainer.lm.learner import Learner, LearnerConfig
from equipoise_trainer.lm.presets import PRESETS
from equipoise_trainer.lm.recipes import RecipeConfig, load
from equipoise_trainer.lm.batches import ShuffledBatches
from equipoise_server.rules import aggregate, build

def run(task, seed, lr, steps, *, settings=None, every=2, power=None, batch=32, log=20, per=32, start=0, oracle=False):
    learner = Learner(LearnerConfig(preset=task.config.preset, seed=seed, learning_rate=lr))
    batches = ShuffledBatches(len(task.train), batch_size=batch, seed=seed)
    curve=[]; mass=np.zeros(3)
    rule=None
    if settings is not None:
        rule=build("strata", settings); state=rule.init(len(task.train), device=torch.device("cpu"))
    at=0
    pool=np.flatnonzero(task.sources==0)
    if oracle: batches=ShuffledBatches(len(pool),batch_size=batch,seed=seed)
    for step in range(steps):
        if step % log == 0: curve.append(learner.measure(task.test))
        ids=batches.at(step)
        if oracle: ids=pool[batches.at(step)]
        losses=learner.losses(task.train[ids])
        w=np.ones(len(ids))
        if rule is not None:
            l=losses.detach().numpy().astype(np.float32)
            st=aggregate(ids, losses=l, contributions=None)
            if step % every == 0:
                rows=task.target[(np.arange(at,at+per))%len(task.target)]; at+=per
                st=replace(st, target_losses=learner.each(rows).astype(np.float32))
            state=rule.update(state, st); w=rule.weights(state, ids).astype(np.float64)
            w=w/w.mean()
            if step<start: w=np.ones(len(ids))
        if step>=steps*.3: mass+=np.bincount(task.sources[ids],weights=w,minlength=3)
        (losses*torch.tensor(w,dtype=torch.float32)).mean().backward()
        learner.step(step)
    curve.append(learner.measure(task.test))
    return curve, mass/mass.sum(), (rule, state) if rule else None

if __name__=="__main__":
    recipe=sys.argv[1]; seeds=[int(s) for s in sys.argv[2].split(',')]; lrs=[float(x) for x in sys.argv[3].split(',')]; steps=int(sys.argv[4]); names=sys.argv[5].split(',')
    S={"k8":dict(),"k8d0":dict(loss_decay=0.),"k16":dict(strata=16),"k16d0":dict(strata=16,loss_decay=0.),"k32d0":dict(strata=32,loss_decay=0.,),"k16w":dict(strata=16,window=512,target_memory=512)}
    for seed in seeds:
        task=load(RecipeConfig(recipe=recipe,preset=PRESETS["small"],seed=seed))
        for lr in lrs:
            for n in names:
                t=time.process_time(); b,_,st=n.partition('@'); c,m,e=run(task,seed,lr,steps,settings=None if b in('uniform','oracle') else S[b],start=int(st or 0),oracle=b=='oracle')
                extra=""
                if e:
                    r=e[0]._ratio(e[1].scalars) if hasattr(e[0],'_ratio') else None
                    extra=" rho "+" ".join(f"{x:.2f}" for x in r)
                print(f"{recipe} N={len(task.train)} seed {seed} lr {lr} {n:8s}", " ".join(f"{x:.3f}" for x in c), f"final {c[-1]:.3f} min {min(c):.3f} shares", np.round(m,2), f"cpu {time.process_time()-t:.0f}"+extra, flush=True)
