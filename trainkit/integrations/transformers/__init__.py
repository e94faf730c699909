"""`transformers.Trainer`: a callback that reduces its gradients over something better than a ring."""

from trainkit.integrations.transformers._comm_hook import CommHook as CommHook
