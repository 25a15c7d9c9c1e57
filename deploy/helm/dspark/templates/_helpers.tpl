{{/* Services are called after it, so it must be a DNS label that begins with a letter; dots become hyphens. */}}
{{- define "dspark.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- $full = $full | replace "." "-" | trunc 50 | trimAll "-" -}}
{{- if not (regexMatch "^[a-z][-a-z0-9]*$" $full) -}}
{{- fail (printf "%q cannot begin a Service's name, which must start with a letter: set fullnameOverride" $full) -}}
{{- end -}}
{{ $full }}
{{- end -}}

{{/* The templates below take a dict of root (the chart's scope) and component (gateway, ...). */}}

{{- define "dspark.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "dspark.labels" -}}
{{ include "dspark.selectorLabels" . }}
app.kubernetes.io/part-of: dspark
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "dspark.componentName" -}}
{{ include "dspark.fullname" .root }}-{{ .component }}
{{- end -}}

{{- define "dspark.serviceAccountName" -}}
{{- if (.Values.serviceAccount).create -}}
{{ default (include "dspark.fullname" .) (.Values.serviceAccount).name }}
{{- else -}}
{{ default "default" (.Values.serviceAccount).name }}
{{- end -}}
{{- end -}}

{{/* The scheduler's own account, which has rights to its Lease; without one of the chart's, the user's. */}}
{{- define "dspark.schedulerServiceAccountName" -}}
{{- if (.Values.serviceAccount).create -}}
{{ include "dspark.componentName" (dict "root" . "component" "scheduler") }}
{{- else -}}
{{ include "dspark.serviceAccountName" . }}
{{- end -}}
{{- end -}}

{{/* redis, lease or off: how schedulers agree on a leader. */}}
{{- define "dspark.leaderElection" -}}
{{- $wanted := .Values.scheduler.leaderElection -}}
{{- $redis := or (.Values.redis).url (.Values.redis).existingSecret -}}
{{- $several := gt (int .Values.scheduler.replicas) 1 -}}
{{- if and (eq $wanted "redis") (not $redis) -}}
{{- fail "scheduler.leaderElection is redis: set redis.url or redis.existingSecret" -}}
{{- else if and (eq $wanted "off") $several -}}
{{- fail (printf "scheduler.replicas is %v: more than one needs scheduler.leaderElection redis, lease or auto" .Values.scheduler.replicas) -}}
{{- else if ne $wanted "auto" -}}
{{ $wanted }}
{{- else if $redis -}}
redis
{{- else if $several -}}
lease
{{- else -}}
off
{{- end -}}
{{- end -}}

{{- define "dspark.image" -}}
{{- $image := .root.Values.image -}}
{{- $own := (index .root.Values .component).image -}}
{{- if $own -}}
{{ $own }}
{{- else -}}
{{- with $image.registry }}{{ . }}/{{ end -}}
{{ $image.repository }}-{{ .component }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* Whether there are drafters: verifiers without any draft from requests' own text and a table of n-grams. */}}
{{- define "dspark.drafts" -}}
{{- if ne .Values.model.drafter "none" }}true{{ end -}}
{{- end -}}

{{/* Whether clients of the gateway must send a key, as far as values show it. An optional secret may be missing. */}}
{{- define "dspark.requiresKeys" -}}
{{- $keys := or .Values.gateway.keysSecret (get (default dict .Values.gateway.env) "DSPARK_API_KEYS") -}}
{{- range .Values.gateway.envFrom -}}
{{- if and .secretRef (not (dig "secretRef" "optional" false .)) -}}
{{- $keys = true -}}
{{- end -}}
{{- end -}}
{{- if $keys }}true{{ end -}}
{{- end -}}

{{/* Of the gateway's Service. */}}
{{- define "dspark.httpPort" -}}
{{ default 8000 (.Values.gateway.service).httpPort }}
{{- end -}}

{{- define "dspark.grpcPort" -}}
{{- get (dict "gateway" 50051 "scheduler" 50052 "verifier" 50053 "drafter" 50054) .component -}}
{{- end -}}

{{/* A section that is null in the values counts as one that sets nothing. */}}
{{- define "dspark.volumeType" -}}
{{ default "none" (.Values.model.volume).type }}
{{- end -}}

{{- define "dspark.modelClaim" -}}
{{ default (printf "%s-models" (include "dspark.fullname" .)) (.Values.model.volume).existingClaim }}
{{- end -}}
