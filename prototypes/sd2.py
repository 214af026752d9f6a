"""Prototype: strata with means smoothed over neighbours, contributions with the noise of the step in their norm.

A CNN on scikit-learn's digits, in process. Run: python strata_smoothed.py uniform,b2e3 pair:.3,random:0 0,1,2,3,4
Prints the test loss after 2, 3, 8, 14 and 20 epochs by seed, accuracy and AUROC at 20, and the weights of seed 0.
b2e3 is the one to build: every third batch measured, 32 target rows, momentum .85, weights act from 250 contributions
a stratum on, kernel (.5, 1, .5) over neighbours, c = V.g - (V.m / q)(m.g + 2|g|^2/B), q the mean square of the batch
gradient, m its mean.
"""
import sys
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
torch.set_num_threads(1)

def flip(labels, share, classes, rng, kind):
    """random: any other class; pair: each class is confused with one other. Returns labels, bool mask of flips."""
    labels = labels.copy()
    flipped = rng.random(len(labels)) < share
    if kind == "random":
        labels[flipped] = (labels[flipped] + rng.integers(1, classes, flipped.sum())) % classes
    elif kind == "pair":
        partner = (np.arange(classes) + 1) % classes if classes % 2 else np.arange(classes) ^ 1
        labels[flipped] = partner[labels[flipped]]
    else:
        raise ValueError(kind)
    return labels, flipped

def data(seed, kind, share):
    rng = np.random.default_rng(seed)
    d = load_digits(); x = (d.images / 16).astype(np.float32)[:, None]; y = d.target.astype(np.int64)
    o = rng.permutation(len(y)); x, y = x[o], y[o]
    test, a, b, tr = slice(0, 497), slice(497, 597), slice(597, 697), slice(697, None)
    ny, bad = flip(y[tr], share, 10, rng, kind)
    t = lambda s, yy=y: (torch.tensor(x[s]), torch.tensor(yy[s]))
    return (torch.tensor(x[tr]), torch.tensor(ny)), t(a), t(b), t(test), bad

def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

@torch.no_grad()
def evaluate(model, xy):
    model.eval(); z = model(xy[0]); model.train()
    return float(F.cross_entropy(z, xy[1])), float((z.argmax(1) == xy[1]).float().mean())

def order(n, seed, epoch, batch=32):
    return np.random.default_rng((seed, epoch)).permutation(n)[: n // batch * batch].reshape(-1, batch)

EV=(2,3,8,14,20)
def run(seed,kind,share,*,uniform=False,selfterm=1.0,every=1,mom=.9,gmom=.9,now=False,min_count=150,mem=.98,K=8,floor=.02,vsize=100,a=1.5,b=1.0,hutch=False,lr=1e-3,epochs=20,unit="rms",smooth=False,start=0,cos=False,later=0,latermom=None,after=64,ratio=0,pw=1.,cap=1.,tw=256,sm=True,zmix=False,raw=False,lg=None,prod=None,ld=.7,nograd=False,kern=.5):
    train,A,B,T,bad=data(seed,kind,share); x,y=train; N=len(y); model=net(seed); opt=torch.optim.Adam(model.parameters(),lr=lr); P=dict(model.named_parameters())
    pg=vmap(grad(lambda p,a_,b_: F.cross_entropy(functional_call(model,p,(a_[None],)),b_[None])),in_dims=(None,0,0))
    V=M=None; Q=None; lema=np.full(N,np.nan); num=np.zeros(K);den=np.zeros(K);sq=np.zeros(K);cnt=np.zeros(K); Wk=np.ones(K); strat=np.full(N,-1); n=0; nm=0; n0=0; ms=None; out={}
    tls=[]; rng=np.random.default_rng(seed+77); qs=None; loss_hist=[]
    for ep in range(epochs):
        for ids in order(N,seed,ep):
            bx,by=x[ids],y[ids]
            L=F.cross_entropy(model(bx),by,reduction="none"); ln=L.detach().numpy()
            lema[ids]=np.where(np.isnan(lema[ids]),ln,ld*lema[ids]+(1-ld)*ln)
            # strata by quantiles of recent smoothed losses (last 512)
            raw_hist=(raw_hist+ln.tolist())[-512:] if n else ln.tolist()
            loss_hist.extend(lema[ids].tolist()); loss_hist=loss_hist[-512:]
            edges=np.quantile(loss_hist,np.arange(1,K)/K); s=np.searchsorted(edges,lema[ids],side='right'); strat[ids]=s
            w=Wk[s]
            if later and nm>=after:
                due=(n-n0)%later==0
                if latermom: mom=latermom
            else: due=n%every==0; n0=n
            if not uniform and due:
                nm+=1
                p={k:v.detach() for k,v in P.items()}
                j=rng.permutation(100)[:vsize]
                LA=F.cross_entropy(model(A[0][j]),A[1][j],reduction='none'); tls.extend(LA.detach().tolist()); tls=tls[-tw:]; 
                if nograd: G=None
                else: ta=torch.cat([t.flatten() for t in torch.autograd.grad(LA.mean(),list(P.values()))]); V=ta if V is None else mom*V+(1-mom)*ta
                if not nograd: G=torch.cat([g.flatten(1) for g in pg(p,bx,by).values()],1)
                wt=torch.tensor(w/w.mean(),dtype=torch.float32); gb=None if nograd else (wt[:,None]*G).mean(0)
                if now:
                    M=gb if M is None else gmom*M+(1-gmom)*gb
                    vp=V-(V@M)/(M@M)*M; c=(G@vp).numpy()
                else:
                    if nograd or M is None: c=np.zeros(len(ids))
                    else:
                        n2=(G**2).sum(1)
                        if hutch:
                            r=torch.randint(0,2,(G.shape[1],),generator=torch.Generator().manual_seed(n))*2.-1; n2=(G@r)**2
                        c=(G@V-(V@M)/(Q if selfterm else M@M)*(G@M+selfterm*n2/len(ids))).numpy()
                
                if cos and not nograd: c=c/(G.norm(dim=1).numpy()+1e-8)
                c2=float((c**2).mean()); ms=c2 if ms is None else .95*ms+.05*c2
                if c2>0:
                    c=np.clip(c/np.sqrt(max(ms,1e-30)),-3,3)
                    d=mem**(len(ids)/ (32) )
                    num*=d;den*=d;sq*=d;
                    np.add.at(num,s,c);np.add.at(den,s,1.);np.add.at(sq,s,c*c);np.add.at(cnt,s,1.)
                    nn_,dd_,qq_=(num,den,sq)
                    if smooth:
                        Kx=np.eye(K)+.5*np.eye(K,k=1)+.5*np.eye(K,k=-1)
                        num_,den_,sq_=Kx@num,Kx@den,Kx@sq; neff=den_**2/((Kx**2)@den+1e-9)
                        mu=num_/np.maximum(den_,1e-9); z=mu/np.sqrt(np.maximum(sq_/np.maximum(den_,1e-9)-mu**2,1e-9)/np.maximum(neff,1))
                    else: z=None
                    zs=z
                    mu=num/np.maximum(den,1e-9); se=np.sqrt(np.maximum(sq/np.maximum(den,1e-9)-mu**2,1e-9)/np.maximum(den,1)); z=mu/se if zs is None else zs
                    if unit=="F":
                        ok=den>0; tot=den.sum(); between=(den*mu**2).sum()/max(K-1,1); within=(sq-den*mu**2).sum()/max(tot-K,1); Fv=between/max(within,1e-9); z=z*np.sqrt(max(0,1-1/max(Fv,1e-9)))
                    Wk=np.where((den>=min_count)&(cnt>=start),floor+(1-floor)/(1+np.exp(-a*(z+b))),1.)
            if ratio and len(tls)>=ratio:
                e2=np.quantile(raw_hist,np.arange(1,K)/K) if raw else edges; hh=raw_hist if raw else loss_hist; sh=np.bincount(np.searchsorted(e2,tls,side='right'),minlength=K)/len(tls); tr=np.bincount(np.searchsorted(e2,hh,side='right'),minlength=K)/len(hh)
                if sm:
                    Kx=np.eye(K)+kern*np.eye(K,k=1)+kern*np.eye(K,k=-1); sh,tr=Kx@sh,Kx@tr
                R=np.clip(sh/np.maximum(tr,1e-9),.0,cap)**pw
                Wr=floor+(1-floor)*R
                Wk=Wr if not zmix else np.where((den>=min_count)&(cnt>=start), np.maximum(np.where(z>0,1.,Wr), 0),1.)
                if prod:
                    aa,bb,p_=prod; zz=(z if (n>0 and den.min()>=30 and cnt.min()>=250) else np.full(K,9.)); r_=np.clip(sh/np.maximum(tr,1e-9),0,1.); Wk=floor+(1-floor)*r_**p_/(1+np.exp(-np.clip(aa*(zz+bb),-30,30)))
                if lg:
                    aa,bb,cc=lg; zz=(z if (n>0 and den.min()>=30 and cnt.min()>=100) else np.zeros(K)); lr_=np.log(np.clip(sh/np.maximum(tr,1e-9),.02,2.)); Wk=floor+(1-floor)/(1+np.exp(-np.clip(aa*zz+bb*lr_+cc,-30,30)))
                w=Wk[s]
            wt=torch.tensor(w/w.mean() if not uniform else np.ones(len(ids)),dtype=torch.float32)
            loss=(wt*L).mean(); opt.zero_grad(); loss.backward()
            gnow=torch.cat([q.grad.flatten() for q in P.values()])
            if not now:
                M=gnow.clone() if M is None else gmom*M+(1-gmom)*gnow; g2=float(gnow@gnow); Q=g2 if Q is None else gmom*Q+(1-gmom)*g2
            opt.step(); n+=1
        if ep+1 in EV:
            l,acc=evaluate(model,T); au=roc_auc_score(bad,-Wk[strat]+1e-6*np.nan_to_num(lema)) if bad.any() else float('nan')
            out[ep+1]=(l,acc,au)
    out['W']=[round(float(v),2) for v in Wk]
    return out
V={
 'q2':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.),
 'q3':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=3.),
 'q2k16':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.,K=16),
 'q2k16s':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.,K=16,kern=1.),
 'q2d9':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.,ld=.9),
 'q3d9':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=3.,ld=.9),
 'q2t512':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.,tw=512),
 'q2d8':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=2.,ld=.8),
 'q4':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=4.),
 'q3k16':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,every=3,ratio=128,raw=True,nograd=True,pw=3.,K=16),
 'uniform':dict(uniform=True),
 'now':dict(now=True),
 'self':dict(),
 'noself':dict(selfterm=0.),
 'self4':dict(every=4,mom=.7),
 'noself4':dict(every=4,mom=.7,selfterm=0.),
 'hutch4':dict(every=4,mom=.7,hutch=True),
 'selfS':dict(smooth=True),'self16':dict(vsize=16),'self16S':dict(vsize=16,smooth=True),'self2':dict(every=2,vsize=32,mom=.8),'selfcos':dict(cos=True),'selfSm':dict(smooth=True,mem=.99),'self30S':dict(smooth=True,min_count=30),'nowS':dict(now=True,smooth=True),'selfS9':dict(smooth=True,gmom=.97,mom=.95),
 'b1':dict(smooth=True,vsize=16,start=400,min_count=30),
 'b2':dict(smooth=True,vsize=16,start=400,min_count=30,selfterm=2.),
 'b4':dict(smooth=True,vsize=16,start=400,min_count=30,selfterm=4.),
 'b2a':dict(smooth=True,vsize=16,start=400,min_count=30,selfterm=2.,a=1.0,b=1.5),
 'b2s':dict(smooth=True,vsize=16,start=400,min_count=30,selfterm=2.,K=16,mem=.98),
 'b2e2':dict(smooth=True,vsize=16,start=300,min_count=30,selfterm=2.,every=2,mom=.9),
 'b2e4':dict(smooth=True,vsize=32,start=200,min_count=30,selfterm=2.,every=4,mom=.8),
 'b2e4m':dict(smooth=True,vsize=32,start=150,min_count=30,selfterm=2.,every=4,mom=.8,mem=.95),
 'b3e2':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=3.,every=2,mom=.9),
 'b2e3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85),
 'l6':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,later=6),'l9':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,later=9),'l9m':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,later=9,latermom=.7),'l12m':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,later=12,latermom=.7),'v16':dict(smooth=True,vsize=16,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True),'l9v16':dict(smooth=True,vsize=16,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,later=9),
 'm99':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,mem=.99),'m995':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True,mem=.995),
 'r1':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128),'r2':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,pw=2.),'r3':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,cap=2.),'r1n':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,sm=False),'r2n':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,pw=2.,sm=False),
 'R1':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True),'R2':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,pw=2.),'L1':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,lg=(1.,2.,2.5)),'L2':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,lg=(1.,3.,3.5)),'L0':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,lg=(0.,3.,3.5)),
 'P1':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,prod=(1.5,1.,2.)),'P2':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,prod=(1.5,1.,1.5)),'P3':dict(smooth=True,vsize=32,start=1e9,min_count=1e9,selfterm=2.,every=3,mom=.85,hutch=True,ratio=128,raw=True,prod=(1.5,1.5,2.)),
 'b1e3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=1.,every=3,mom=.85),
 'b0e3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=0.,every=3,mom=.85),
 'bqe3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=1e-9,every=3,mom=.85),
 'h2e3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=2.,every=3,mom=.85,hutch=True),
 'h1e3':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=1.,every=3,mom=.85,hutch=True),
 'b1e2':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=1.,every=2,mom=.9),
 'b0e2':dict(smooth=True,vsize=32,start=250,min_count=30,selfterm=0.,every=2,mom=.9),
 'selfF':dict(unit="F"),
 'self4F':dict(every=4,mom=.7,unit="F"),
 'self4F30':dict(every=4,mom=.7,unit="F",min_count=30),
}
if __name__=="__main__":
    seeds=[int(s) for s in sys.argv[3].split(',')]
    for kind,share in [(k.split(':')[0],float(k.split(':')[1])) for k in sys.argv[2].split(',')]:
        for m in sys.argv[1].split(','):
            R=[run(s,kind,share,**V[m]) for s in seeds]
            print(f"{m:10s} {kind} {share} "+" | ".join(f"e{e} "+" ".join(f"{r[e][0]:.3f}" for r in R) for e in EV)+" || acc "+" ".join(f"{r[20][1]:.3f}" for r in R)+" au "+" ".join(f"{r[20][2]:.2f}" for r in R)+" W "+" ".join(str(r["W"]) for r in R),flush=True)
