import sys, time; sys.path.insert(0,'/tmp')
import numpy as np, torch, torch.nn.functional as F
from sd2 import data, net, order, evaluate
from sklearn.metrics import roc_auc_score
EV=(1,2,3,8,14,20)
def run(seed,kind,share,*,uniform=False,K=8,ld=.7,every=3,rows=32,mem=256,pw=2.,c=0.,kern=.5,floor=.02,minc=100,lr=1e-3,epochs=20,form="pow",distinct=100.,J=0,tau=1.,hier=False):
    train,A,B,T,bad=data(seed,kind,share); x,y=train; N=len(y); model=net(seed); opt=torch.optim.Adam(model.parameters(),lr=lr)
    lema=np.full(N,np.nan); strat=np.full(N,-1); v=np.zeros(K); W=np.ones(K); hist=[]; n=0; rng=np.random.default_rng(seed+77); out={}
    Kx=np.eye(K)+kern*np.eye(K,k=1)+kern*np.eye(K,k=-1); Kn=Kx/Kx.sum(1,keepdims=True)
    from numpy.polynomial import legendre as lg
    PHI=[np.array([np.mean(lg.legval(2*np.linspace(k/K,(k+1)/K,21)-1,np.eye(q+2)[q+1]))*np.sqrt(2*q+3) for k in range(K)]) for q in range(8)]
    grid=np.arange(K+1)/K
    for ep in range(epochs):
        for ids in order(N,seed,ep):
            L=F.cross_entropy(model(x[ids]),y[ids],reduction="none"); ln=L.detach().numpy().astype(float)
            if not uniform and n%every==0:
                j=rng.permutation(100)[:rows]
                with torch.no_grad(): t=F.cross_entropy(model(A[0][j]),A[1][j],reduction='none').numpy()
                s=np.sort(ln); lo=np.searchsorted(s,t,'left')/(len(s)+1); hi=(np.searchsorted(s,t,'right')+1)/(len(s)+1)
                cover=np.clip((np.minimum(hi[:,None],grid[None,1:])-np.maximum(lo[:,None],grid[None,:-1])),0,None)/(hi-lo)[:,None]
                v=v*mem/(mem+len(t))+cover.sum(0)
                tot=v.sum()
                if tot>=minc:
                    r=(Kn@v)/(tot/K)
                    if c:
                        eff=np.maximum(Kx.sum(1)**2/ (Kx**2).sum(1),1)  # cells pooled
                        cnt=(Kn@v)*eff*min(1.,distinct/tot)
                        r=(Kn@v+c*(Kn@v)/np.sqrt(np.maximum(cnt,1e-9))+c*c*.5*tot/K/np.maximum(eff*min(1.,distinct/tot)*tot/K,1e-9))/(tot/K)
                    if J:
                        n_=tot*min(1.,distinct/tot); p_=v/tot
                        r=np.ones(K)
                        go=True
                        for q in range(J):
                            th=float((PHI[q]*p_).sum()); z2=n_*th*th
                            r=r+max(0.,1-tau/max(z2,1e-9))*th*PHI[q]
                    r=np.clip(r,0,1)
                    W=np.maximum(r**pw,floor)
            if not uniform:
                lema[ids]=np.where(np.isnan(lema[ids]),ln,ld*lema[ids]+(1-ld)*ln); hist.extend(lema[ids].tolist()); hist=hist[-512:]
                edges=np.quantile(hist,np.arange(1,K)/K); s_=np.searchsorted(edges,lema[ids],side='right'); strat[ids]=s_; w=W[s_]; w=w/w.mean()
            else: w=np.ones(len(ids))
            loss=(torch.tensor(w,dtype=torch.float32)*L).mean(); opt.zero_grad(); loss.backward(); opt.step(); n+=1
        if ep+1 in EV:
            l,acc=evaluate(model,T); au=roc_auc_score(bad,-W[strat]+1e-6*np.nan_to_num(lema)) if bad.any() and not uniform else float('nan'); out[ep+1]=(l,acc,au)
    out['W']=[round(float(q),2) for q in W]; return out
V={'uniform':dict(uniform=True),'r':dict(),'nk8':dict(mem=1024,pw=4.,every=6,minc=384,K=8),'nk8d5':dict(mem=1024,pw=4.,every=6,minc=384,K=8,ld=.5),'nd3':dict(mem=1024,pw=4.,every=6,minc=384,K=16,ld=.3),'nd0':dict(mem=1024,pw=4.,every=6,minc=384,K=16,ld=.0),'nd5k12':dict(mem=1024,pw=4.,every=6,minc=384,K=12,ld=.5),'nk32':dict(mem=1024,pw=4.,every=6,minc=384,K=32,kern=1.),'np5':dict(mem=1024,pw=5.,every=6,minc=384,K=16),'nm2':dict(mem=2048,pw=4.,every=6,minc=384,K=16),'n512':dict(mem=1024,pw=4.,every=6,minc=512,K=16),'nk1':dict(mem=1024,pw=4.,every=6,minc=384,K=16,kern=1.),'nk12':dict(mem=1024,pw=4.,every=6,minc=384,K=12),'nd8':dict(mem=1024,pw=4.,every=6,minc=384,K=16,ld=.8),'nd5':dict(mem=1024,pw=4.,every=6,minc=384,K=16,ld=.5),'b':dict(J=4,mem=1024,pw=4.,every=6,minc=384),'bj8':dict(J=8,mem=1024,pw=4.,every=6,minc=384,K=16),'bj6':dict(J=6,mem=1024,pw=4.,every=6,minc=384,K=16),'bj8p3':dict(J=8,mem=1024,pw=3.,every=6,minc=384,K=16),'bn':dict(mem=1024,pw=4.,every=6,minc=384,K=16),'bn3':dict(mem=1024,pw=3.,every=6,minc=384,K=16),'a':dict(J=4,mem=1024,pw=4.),'a5':dict(J=4,mem=1024,pw=5.),'a6':dict(J=4,mem=1024,pw=6.),'ak16':dict(J=4,mem=1024,pw=4.,K=16),'ad8':dict(J=4,mem=1024,pw=4.,ld=.8),'ae6':dict(J=4,mem=1024,pw=4.,every=6),'jm1':dict(J=4,mem=1024),'jm4':dict(J=4,mem=4096),'jm1p3':dict(J=4,mem=1024,pw=3.),'jm1p4':dict(J=4,mem=1024,pw=4.),'jm1p3k16':dict(J=4,mem=1024,pw=3.,K=16),'jm4p3':dict(J=4,mem=4096,pw=3.),'j4':dict(J=4,kern=0.),'j4t2':dict(J=4,tau=2.),'j6':dict(J=6),'j4k16':dict(J=4,K=16),'j3':dict(J=3),'j4p3':dict(J=4,pw=3.),'j4k16p3':dict(J=4,K=16,pw=3.),'c1':dict(c=1.),'c2':dict(c=2.),'c1p3':dict(c=1.,pw=3.),'c2p3':dict(c=2.,pw=3.),'c1k16':dict(c=1.,K=16),'c1m512':dict(c=1.,mem=512),'c1d9':dict(c=1.,ld=.9),'c1p4':dict(c=1.,pw=4.),'c15p4':dict(c=1.5,pw=4.),
'c1p3k12':dict(c=1.,pw=3.,K=12),'c1m512p3':dict(c=1.,pw=3.,mem=512),'c1e6':dict(c=1.,every=6),'c1e6r16':dict(c=1.,every=6,rows=16)}
if __name__=="__main__":
    seeds=[int(s) for s in sys.argv[3].split(',')]
    for kind,share in [(k.split(':')[0],float(k.split(':')[1])) for k in sys.argv[2].split(',')]:
        base=None
        for m in sys.argv[1].split(','):
            R=[run(s,kind,share,**V[m]) for s in seeds]
            print(f"{m:8s} {kind} {share} "+" | ".join(f"e{e} {np.mean([r[e][0] for r in R]):.3f}" for e in EV)+" || e20 "+" ".join(f"{r[20][0]:.3f}" for r in R)+" acc "+f"{np.mean([r[20][1] for r in R]):.3f}"+" au "+" ".join(f"{r[20][2]:.2f}" for r in R)+" W "+" ".join(str(r["W"]) for r in R[:3]),flush=True)
