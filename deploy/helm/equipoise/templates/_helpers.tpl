{{- define "equipoise.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* 52 characters, as a StatefulSet's pods carry a label of its name and a hash. */}}
{{- define "equipoise.fullname" -}}
{{- $name := include "equipoise.name" . }}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* The headless Service: pods are POD.PODS.NAMESPACE.svc. */}}
{{- define "equipoise.pods" -}}
{{- include "equipoise.fullname" . }}-pods
{{- end }}

{{- define "equipoise.selector" -}}
app.kubernetes.io/name: {{ include "equipoise.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "equipoise.labels" -}}
{{ include "equipoise.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: server
app.kubernetes.io/part-of: equipoise
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Metadata of what monitors; its name is "name" of the context, a list of root and name. */}}
{{- define "equipoise.monitoring" -}}
{{- $root := index . 0 -}}
name: {{ index . 1 }}
namespace: {{ default $root.Release.Namespace $root.Values.monitoring.namespace }}
labels:
  {{- include "equipoise.labels" $root | nindent 2 }}
{{- end }}

{{- define "equipoise.serviceAccount" -}}
{{- default (.Values.serviceAccount.create | ternary (include "equipoise.fullname" .) "default") .Values.serviceAccount.name }}
{{- end }}

{{- define "equipoise.image" -}}
{{- $gpu := or .Values.gpu.resource .Values.gpu.claim }}
{{- $tag := default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" (not (empty $gpu)))) .Values.image.tag }}
{{- .Values.image.repository }}{{ .Values.image.digest | empty | ternary (printf ":%s" $tag) (printf "@%s" .Values.image.digest) }}
{{- end }}

{{- define "equipoise.tlsSecret" -}}
{{- .Values.tls.certManager.issuer | empty | ternary .Values.tls.existingSecret (printf "%s-tls" (include "equipoise.fullname" .)) }}
{{- end }}

{{/* What the server would refuse later, refused now. */}}
{{- define "equipoise.check" -}}
{{- $redis := .Values.redis }}
{{- if not (or $redis.url (and $redis.existingSecret.name $redis.existingSecret.urlKey)) }}
{{- fail "redis: give redis.url, or redis.existingSecret with name and urlKey; the image has no Redis of its own" }}
{{- end }}
{{- if and $redis.url $redis.existingSecret.urlKey }}
{{- fail "redis: redis.url and redis.existingSecret.urlKey are both set: keep one" }}
{{- end }}
{{- $tls := include "equipoise.tlsSecret" . }}
{{- if and .Values.tls.existingSecret .Values.tls.certManager.issuer }}
{{- fail "tls: existingSecret and certManager.issuer are both set: keep one" }}
{{- end }}
{{- if and .Values.tls.clientCertificates (not $tls) }}
{{- fail "tls: clientCertificates needs existingSecret or certManager.issuer" }}
{{- end }}
{{- if not (or .Values.allowInsecure (and $tls (or .Values.tokens.existingSecret .Values.tls.clientCertificates))) }}
{{- fail "the server is not guarded: give tls with tokens or tls.clientCertificates; or set allowInsecure, where everybody who reaches the port may do everything" }}
{{- end }}
{{- if and .Values.gpu.resource .Values.gpu.claim }}
{{- fail "gpu: resource and claim are both set: keep one" }}
{{- end }}
{{- if and .Values.gpu.claim (semverCompare "<1.34-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "gpu: claim needs Kubernetes 1.34, this is %s; use gpu.resource" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if and (eq .Values.autoscaling.kind "KEDA") (not .Values.autoscaling.prometheus) }}
{{- fail "autoscaling: KEDA needs autoscaling.prometheus, the URL of a Prometheus" }}
{{- end }}
{{- end }}

{{/* The server's settings as YAML: what the values say, and what the chart says itself. */}}
{{- define "equipoise.settings" -}}
{{- $redis := .Values.redis }}
{{- $secret := $redis.existingSecret }}
{{- $settings := dict "listen" ":50051" "metrics_listen" ":9464" "device" (or .Values.gpu.resource .Values.gpu.claim | empty | ternary "cpu" "cuda") }}
{{- if include "equipoise.tlsSecret" . }}
{{- $_ := merge $settings (dict "tls_certificate" "/etc/equipoise/tls/tls.crt" "tls_key" "/etc/equipoise/tls/tls.key") }}
{{- if .Values.tls.clientCertificates }}{{ $_ := set $settings "tls_client_ca" "/etc/equipoise/tls/ca.crt" }}{{ end }}
{{- end }}
{{- if .Values.tokens.existingSecret }}{{ $_ := set $settings "tokens_file" "/etc/equipoise/tokens.toml" }}{{ end }}
{{- if .Values.allowInsecure }}{{ $_ := set $settings "allow_insecure" true }}{{ end }}
{{- with $redis.url }}{{ $_ := set $settings "redis_url" . }}{{ end }}
{{- with $redis.username }}{{ $_ := set $settings "redis_username" . }}{{ end }}
{{- with $redis.sentinelUsername }}{{ $_ := set $settings "redis_sentinel_username" . }}{{ end }}
{{- if $secret.name }}
{{- $_ := set $settings ($secret.urlKey | empty | ternary "redis_password_file" "redis_url_file") ($secret.urlKey | empty | ternary "/etc/equipoise/redis/password" "/etc/equipoise/redis/url") }}
{{- if $secret.sentinelPasswordKey }}{{ $_ := set $settings "redis_sentinel_password_file" "/etc/equipoise/redis/sentinel-password" }}{{ end }}
{{- end }}
{{- if $redis.tls.existingSecret }}
{{- $_ := set $settings "redis_tls_ca" "/etc/equipoise/redis/ca.crt" }}
{{- if $redis.tls.certificateKey }}
{{- $_ := merge $settings (dict "redis_tls_certificate" "/etc/equipoise/redis/tls.crt" "redis_tls_key" "/etc/equipoise/redis/tls.key") }}
{{- end }}
{{- end }}
{{- range $name, $value := merge $settings .Values.settings }}
EQUIPOISE_{{ upper $name }}: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}

{{/* Sources of the one volume: every Secret, each under the path that the settings name. */}}
{{- define "equipoise.secrets" -}}
{{- $redis := .Values.redis }}
{{- with include "equipoise.tlsSecret" . }}
- secret:
    name: {{ . }}
    items:
      - {key: tls.crt, path: tls/tls.crt}
      - {key: tls.key, path: tls/tls.key}
      {{- if $.Values.tls.clientCertificates }}
      - {key: ca.crt, path: tls/ca.crt}
      {{- end }}
{{- end }}
{{- with .Values.tokens.existingSecret }}
- secret:
    name: {{ . }}
    items:
      - {key: {{ $.Values.tokens.key }}, path: tokens.toml}
{{- end }}
{{- with $redis.existingSecret.name }}
- secret:
    name: {{ . }}
    items:
      {{- if $redis.existingSecret.urlKey }}
      - {key: {{ $redis.existingSecret.urlKey }}, path: redis/url}
      {{- else }}
      - {key: {{ $redis.existingSecret.passwordKey }}, path: redis/password}
      {{- end }}
      {{- with $redis.existingSecret.sentinelPasswordKey }}
      - {key: {{ . }}, path: redis/sentinel-password}
      {{- end }}
{{- end }}
{{- with $redis.tls.existingSecret }}
- secret:
    name: {{ . }}
    items:
      - {key: {{ $redis.tls.caKey }}, path: redis/ca.crt}
      {{- with $redis.tls.certificateKey }}
      - {key: {{ . }}, path: redis/tls.crt}
      - {key: {{ required "redis.tls.keyKey: is needed with certificateKey" $redis.tls.keyKey }}, path: redis/tls.key}
      {{- end }}
{{- end }}
{{- end }}
